"""ImageCaptionStore: exact records, several processes, killed writers, damaged files."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.dish_films import DishFilms
from datasets.dishes import Dishes
from datasets.lmdb_store import ImageCaptionStore, append_records, count_records

from .example_files import encode_image, read_lmdb, write_lmdb


def write(folder, records, **options):
    for _ in append_records(folder, records, **options):
        pass


def test_stored_records_equal_the_originals_exactly(tmp_path):
    folder = tmp_path / "store"
    dishes = Dishes(20, 32)
    assert list(append_records(folder, dishes)) == list(range(1, 21))
    store = ImageCaptionStore(folder)
    assert len(store) == 20
    for i in (0, 7, 19):
        assert torch.equal(store[i][0], dishes[i][0])
        assert store[i][1] == dishes[i][1]
    with pytest.raises(IndexError):
        store[20]


def test_the_content_of_an_image_file_is_stored_unchanged(tmp_path):
    jpeg = encode_image(Image.fromarray(np.full((40, 30, 3), 77, np.uint8)), quality=80)
    write(tmp_path / "store", [(jpeg, "番茄汤")])
    record = dict(read_lmdb(tmp_path / "store"))[b"000000000"]
    assert record.endswith(jpeg)


def test_stores_of_the_first_version_are_read_and_appended_to(tmp_path):
    folder = tmp_path / "store"
    png = encode_image(Image.new("RGB", (9, 7), "red"), "PNG")
    header = '{"caption": "番茄汤"}'.encode()
    metadata = b'{"layout": "easy-diffusion image-caption", "version": 1, "count": 1}'
    with write_lmdb(folder) as transaction:
        transaction.put(b"000000000", len(header).to_bytes(4, "little") + header + png)
        transaction.put(b"about", metadata)
    write(folder, Dishes(2, 32))
    store = ImageCaptionStore(folder)
    assert len(store) == 3
    image, caption = store[0]
    assert image.shape == (3, 7, 9)
    assert image[0].min() == 255
    assert caption == "番茄汤"
    assert torch.equal(store[2][0], Dishes(2, 32)[1][0])


def test_a_store_grows_beyond_its_initial_map_size(tmp_path):
    folder = tmp_path / "store"
    image = torch.randint(256, (3, 256, 256), dtype=torch.uint8)  # 200 kB
    records = ((image, str(i)) for i in range(400))  # 80 MB > 64 MiB
    write(folder, records, per_transaction=50)
    store = ImageCaptionStore(folder)
    assert len(store) == 400
    assert store[399][1] == "399"
    assert torch.equal(store[0][0], image)


def test_four_spawned_and_four_forked_workers_read_the_same_records_at_once(tmp_path):
    dishes = Dishes(48, 32)
    write(tmp_path / "store", dishes)
    store = ImageCaptionStore(tmp_path / "store")
    assert store[0][1] == dishes[0][1]  # opens the file in the parent process
    loaders = [
        torch.utils.data.DataLoader(store, 6, num_workers=4, multiprocessing_context=context)
        for context in ("spawn", "fork")
    ]
    batch_pairs = list(zip(*loaders, strict=True))  # both loaders read alternately
    for batches in zip(*batch_pairs):  # the batches of one loader
        images = torch.cat([images for images, _ in batches])
        names = [name for _, batch_names in batches for name in batch_names]
        assert torch.equal(images, torch.stack([dishes[i][0] for i in range(48)]))
        assert names == [dishes[i][1] for i in range(48)]


def test_a_killed_writer_resumes_without_losing_or_repeating_a_record(tmp_path):
    folder = tmp_path / "store"
    program = """
import sys
import torch
from datasets.dishes import Dishes
from datasets.lmdb_store import append_records, count_records
count = count_records(sys.argv[1])
rest = torch.utils.data.Subset(Dishes(100_000, 32), range(count, 100_000))
for count in append_records(sys.argv[1], rest, per_transaction=16):
    print(count, flush=True)
"""
    command = [sys.executable, "-c", program, str(folder)]
    previous = 0
    for lines in (20, 90):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        reported = [int(writer.stdout.readline()) for _ in range(lines)][-1]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        written = count_records(folder)
        assert reported == previous + lines
        assert written >= reported
        assert written % 16 == 0  # whole transactions
        previous = written
    dishes = Dishes(written, 32)
    store = ImageCaptionStore(folder)
    assert [store[i][1] for i in range(written)] == [dishes[i][1] for i in range(written)]
    assert torch.equal(store[written - 1][0], dishes[written - 1][0])


def test_errors_name_missing_incompatible_newer_and_damaged_stores(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store in .*nowhere"):
        ImageCaptionStore(tmp_path / "nowhere")

    with write_lmdb(tmp_path / "incompatible") as transaction:
        transaction.put(b"0", b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="incompatible holds an LMDB, but not one"):
        ImageCaptionStore(tmp_path / "incompatible")

    # The layout of this project's predecessor: pickled pairs under the keys 0, 1, …, and a count.
    with write_lmdb(tmp_path / "predecessor") as transaction:
        for i in range(3):
            pair = (np.zeros((8, 8, 3), np.uint8), "番茄汤")
            transaction.put(str(i).encode(), pickle.dumps(pair))
        transaction.put(b"__len__", pickle.dumps(3))
    with pytest.raises(ValueError, match="predecessor holds an LMDB, but not one"):
        list(append_records(tmp_path / "predecessor", Dishes(1, 32)))
    with lmdb.open(str(tmp_path / "predecessor"), lock=False) as environment:
        assert environment.stat()["entries"] == 4, "nothing has been added"

    metadata = b'{"layout": "easy-diffusion image-caption", "version": 9, "count": 1}'
    with write_lmdb(tmp_path / "newer") as transaction:
        transaction.put(b"about", metadata)
    with pytest.raises(ValueError, match="version 9"):
        ImageCaptionStore(tmp_path / "newer")

    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "data.mdb").write_bytes(os.urandom(20_000))
    with pytest.raises(ValueError, match="random cannot be opened as LMDB"):
        ImageCaptionStore(tmp_path / "random")


def test_errors_name_damaged_and_missing_records(tmp_path):
    folder = tmp_path / "store"
    write(folder, Dishes(4, 32))
    with write_lmdb(folder) as transaction:
        record = transaction.get(b"000000001")
        transaction.put(b"000000001", record[: len(record) // 2])
        transaction.put(b"000000002", b"\x80\x04K\x01.")
        transaction.delete(b"000000003")
    store = ImageCaptionStore(folder)
    assert store[0][0].shape == (3, 32, 32)
    for index, error in ((1, ValueError), (2, ValueError), (3, KeyError)):
        with pytest.raises(error, match=f"record {index} "):
            store[index]


@pytest.mark.parametrize(
    "record, message",
    [
        ((torch.zeros(3, 8, 8), "番茄汤"), "uint8"),
        ((torch.zeros(8, 8, 3, dtype=torch.uint8), "番茄汤"), "8, 8, 3"),
        ((torch.zeros(3, 8, 8, dtype=torch.uint8), 7), "7"),
    ],
)
def test_invalid_records_raise_and_nothing_is_written(tmp_path, record, message):
    with pytest.raises((ValueError, TypeError), match=message):
        write(tmp_path / "store", [record])
    assert count_records(tmp_path / "store") == 0


def test_an_open_store_sees_what_another_process_appends(tmp_path):
    """The store grows from a few records to 30 MB, far beyond the size that was mapped first."""
    folder = tmp_path / "store"
    write(folder, Dishes(4, 32))
    assert ImageCaptionStore(folder)[3][0].shape == (3, 32, 32)
    program = """
import sys
import torch
from datasets.lmdb_store import append_records
image = torch.randint(256, (3, 256, 256), dtype=torch.uint8)
for _ in append_records(sys.argv[1], ((image, str(i)) for i in range(150))):
    pass
"""
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    store = ImageCaptionStore(folder)
    assert len(store) == 154
    assert store[153][1] == "149"
    assert store[0][0].shape == (3, 32, 32)


def read_while_it_grows(folder, length, ready, results):
    """Read the last record again and again; stop at `length` records or at a wrong record."""
    dishes = Dishes(length, 32)
    lengths = []
    ready.set()
    while not lengths or lengths[-1] < length:
        store = ImageCaptionStore(folder)
        image, name = store[len(store) - 1]
        expected_image, expected_name = dishes[len(store) - 1]
        if not torch.equal(image, expected_image) or name != expected_name:
            break
        lengths.append(len(store))
    results.put(lengths)


def test_two_processes_read_while_a_third_writes(tmp_path):
    folder = tmp_path / "store"
    write(folder, Dishes(1, 32))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    ready_events = [fork.Event(), fork.Event()]
    processes = [
        fork.Process(target=read_while_it_grows, args=(folder, 300, event, results))
        for event in ready_events
    ]
    for process in processes:
        process.start()
    for event in ready_events:
        assert event.wait(60)
    dishes = Dishes(300, 32)
    write(folder, (dishes[i] for i in range(1, 300)), per_transaction=3)
    for _ in processes:
        lengths = results.get(timeout=60)
        assert lengths == sorted(lengths)
        assert lengths[-1] == 300
        assert len(set(lengths)) > 3
    for process in processes:
        process.join(60)


def test_a_process_can_read_while_it_writes_but_only_one_can_write(tmp_path):
    folder = tmp_path / "store"
    dishes = Dishes(40, 32)

    # Reading while writing, in one process.
    writing = append_records(folder, dishes, per_transaction=10)
    assert next(writing) == 1
    assert count_records(folder) == 10
    assert ImageCaptionStore(folder)[9][1] == dishes[9][1]

    # A second writer in the same process.
    with pytest.raises(RuntimeError, match="being written to"):
        next(append_records(folder, Dishes(1, 32)))
    assert list(writing)[-1] == 40
    assert len(ImageCaptionStore(folder)) == 40

    # A second writer in another process.
    writing = append_records(folder, dishes, per_transaction=10)
    next(writing)
    program = """
import sys
from datasets.dishes import Dishes
from datasets.lmdb_store import append_records
list(append_records(sys.argv[1], Dishes(3, 32)))
"""
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    with pytest.raises(RuntimeError, match="another process is writing"):
        list(writing)
    store = ImageCaptionStore(folder)
    assert len(store) == 53
    assert all(store[i][0].shape == (3, 32, 32) for i in range(53))


def test_a_full_disk_raises_and_earlier_records_stay_readable(tmp_path):
    """A limit of 2 MB per file in the writing process stands for a full disk."""
    folder = tmp_path / "store"
    program = """
import resource
import sys
from datasets.dishes import Dishes
from datasets.lmdb_store import append_records
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
for count in append_records(sys.argv[1], Dishes(2000, 32), per_transaction=64):
    print(count)
"""
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert f"OSError: {folder} cannot be written to: " in result.stderr, result.stderr

    written = int(result.stdout.split()[-1])
    store = ImageCaptionStore(folder)
    dishes = Dishes(2000, 32)
    assert len(store) == written
    assert 64 <= written < 500
    assert (folder / "data.mdb").stat().st_size <= 2_000_000
    assert all(torch.equal(store[i][0], dishes[i][0]) for i in range(written))

    # Without the limit, writing can be resumed.
    write(folder, [dishes[i] for i in range(written, 500)])
    store = ImageCaptionStore(folder)
    assert len(store) == 500
    assert torch.equal(store[499][0], dishes[499][0])


def test_a_store_holds_films(tmp_path):
    films = DishFilms(3, 32, frames=4)
    assert list(append_records(tmp_path, (films[i] for i in range(3)))) == [1, 2, 3]
    frames, name = ImageCaptionStore(tmp_path)[2]
    assert frames.shape == (4, 3, 32, 32) and name == films[2][1]
    assert torch.equal(frames, films[2][0])
