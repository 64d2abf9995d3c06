import io
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys

import lmdb
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from datasets.caption_embeddings import StoredCaptionEmbeddings, write_caption_embeddings
from datasets.dishes import Dishes
from datasets.lmdb_store import ImageCaptionStore, append_records, count_records, read_captions
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.trainer import train


def write(folder, records, **options):
    for _ in append_records(folder, records, **options):
        pass


def test_records_come_back_to_the_bit(tmp_path):
    dishes = Dishes(20, 32)
    assert list(append_records(tmp_path / "s", dishes)) == list(range(1, 21))
    store = ImageCaptionStore(tmp_path / "s")
    assert len(store) == 20
    for i in (0, 7, 19):
        assert torch.equal(store[i][0], dishes[i][0]) and store[i][1] == dishes[i][1]
    with pytest.raises(IndexError):
        store[20]


def test_an_encoded_picture_is_stored_as_it_is(tmp_path):
    jpeg = io.BytesIO()
    Image.fromarray(np.full((40, 30, 3), 77, np.uint8)).save(jpeg, "JPEG", quality=80)
    write(tmp_path / "s", [(jpeg.getvalue(), "番茄汤")])
    with lmdb.open(str(tmp_path / "s"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert transaction.get(b"000000000").endswith(jpeg.getvalue())


def test_stores_of_the_first_version_are_read_and_continued(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(png, "PNG")
    header = '{"caption": "番茄汤"}'.encode()
    with lmdb.open(str(tmp_path / "s")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"000000000", len(header).to_bytes(4, "little") + header + png.getvalue())
        transaction.put(b"about", b'{"layout": "easy-diffusion image-caption", "version": 1, "count": 1}')
    write(tmp_path / "s", Dishes(2, 32))
    store = ImageCaptionStore(tmp_path / "s")
    assert len(store) == 3 and store[0][0].shape == (3, 7, 9) and store[0][0][0].min() == 255 and store[0][1] == "番茄汤"
    assert torch.equal(store[2][0], Dishes(2, 32)[1][0])


def test_a_store_grows_beyond_its_first_map(tmp_path):
    noise = torch.randint(256, (3, 256, 256), dtype=torch.uint8)           # does not compress: 200 kB
    write(tmp_path / "s", ((noise, str(i)) for i in range(400)), per_transaction=50)       # 80 MB > 64 MiB
    store = ImageCaptionStore(tmp_path / "s")
    assert len(store) == 400 and store[399][1] == "399" and torch.equal(store[0][0], noise)


def test_four_spawned_and_four_forked_workers_read_the_same_records_at_once(tmp_path):
    write(tmp_path / "s", Dishes(48, 32))
    store = ImageCaptionStore(tmp_path / "s")
    assert store[0][1] == Dishes(48, 32)[0][1]                             # already open in the parent
    loaders = [torch.utils.data.DataLoader(store, 6, num_workers=4, multiprocessing_context=context) for context in ("spawn", "fork")]
    pairs = list(zip(*loaders, strict=True))                               # a batch of each in turn
    for pictures, names in (zip(*batches) for batches in zip(*pairs)):
        assert torch.equal(torch.cat(pictures), torch.stack([p for p, _ in Dishes(48, 32)]))
        assert sum(map(list, names), []) == [n for _, n in Dishes(48, 32)]


def test_killed_while_writing_it_goes_on_with_no_record_lost_or_doubled(tmp_path):
    program = ("import sys; from datasets.lmdb_store import append_records, count_records; from datasets.dishes import Dishes\n"
               "import torch; n = count_records(sys.argv[1])\n"
               "for n in append_records(sys.argv[1], torch.utils.data.Subset(Dishes(100000, 32), range(n, 100000)), per_transaction=16):\n"
               "    print(n, flush=True)")
    last = 0
    for lines in (20, 90):
        writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True)
        said = [int(writer.stdout.readline()) for _ in range(lines)][-1]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        written = count_records(tmp_path / "s")
        assert written >= said == last + lines and written % 16 == 0        # what it said is there, and it stopped at a transaction
        last = written
    dishes, store = Dishes(last, 32), ImageCaptionStore(tmp_path / "s")
    assert [store[i][1] for i in range(last)] == [dishes[i][1] for i in range(last)]
    assert torch.equal(store[last - 1][0], dishes[last - 1][0])


def test_foreign_empty_and_newer_stores_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store in .*nowhere"):
        ImageCaptionStore(tmp_path / "nowhere")
    with lmdb.open(str(tmp_path / "foreign")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="foreign holds an LMDB, but not one"):
        ImageCaptionStore(tmp_path / "foreign")
    with lmdb.open(str(tmp_path / "predecessor")) as environment, environment.begin(write=True) as transaction:
        for i in range(3):                                                  # pickled pairs under plain numbers, and their count
            transaction.put(str(i).encode(), pickle.dumps((np.zeros((8, 8, 3), np.uint8), "番茄汤")))
        transaction.put(b"__len__", pickle.dumps(3))
    with pytest.raises(ValueError, match="predecessor holds an LMDB, but not one"):
        list(append_records(tmp_path / "predecessor", Dishes(1, 32)))
    with lmdb.open(str(tmp_path / "predecessor"), lock=False) as environment:
        assert environment.stat()["entries"] == 4                           # and nothing was added to it
    with lmdb.open(str(tmp_path / "newer")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"about", b'{"layout": "easy-diffusion image-caption", "version": 9, "count": 1}')
    with pytest.raises(ValueError, match="version 9"):
        ImageCaptionStore(tmp_path / "newer")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(os.urandom(20_000))
    with pytest.raises(ValueError, match="noise cannot be opened as LMDB"):
        ImageCaptionStore(tmp_path / "noise")


def test_damaged_and_missing_records_are_named(tmp_path):
    write(tmp_path / "s", Dishes(4, 32))
    with lmdb.open(str(tmp_path / "s")) as environment, environment.begin(write=True) as transaction:
        record = transaction.get(b"000000001")
        transaction.put(b"000000001", record[:len(record) // 2])
        transaction.put(b"000000002", b"\x80\x04K\x01.")
        transaction.delete(b"000000003")
    store = ImageCaptionStore(tmp_path / "s")
    assert store[0][0].shape == (3, 32, 32)
    for index, kind in ((1, ValueError), (2, ValueError), (3, KeyError)):
        with pytest.raises(kind, match=f"record {index} "):
            store[index]


@pytest.mark.parametrize("record, says", [
    ((torch.zeros(3, 8, 8), "番茄汤"), "uint8"), ((torch.zeros(8, 8, 3, dtype=torch.uint8), "番茄汤"), "8, 8, 3"),
    ((torch.zeros(3, 8, 8, dtype=torch.uint8), 7), "7"),
])
def test_records_of_another_form_are_refused_and_nothing_is_written(tmp_path, record, says):
    with pytest.raises((ValueError, TypeError), match=says):
        write(tmp_path / "s", [record])
    assert count_records(tmp_path / "s") == 0


class Spelling(torch.nn.Module):
    """An encoder for tests: a state for each character, and one at the start; it counts what it is asked."""

    dim, asked = 4, 0

    def forward(self, read_captions):
        self.asked += len(read_captions)
        lengths = torch.tensor([len(caption) + 1 for caption in read_captions])
        states = torch.zeros(len(read_captions), lengths.max(), self.dim)
        for row, caption in zip(states, read_captions):
            row[:len(caption) + 1] = torch.tensor([[1.0] * 4, *([ord(c) / 3e4, 2.0, 3.0, 4.0] for c in caption)])
        return states, torch.arange(lengths.max()) < lengths[:, None]


class Deaf(Spelling):
    """It says the same of each caption."""

    def forward(self, read_captions):
        states, mask = super().forward(["" for _ in read_captions])
        return -states, mask


def test_states_of_captions_come_back_to_half_precision(tmp_path):
    dishes, encoder = Dishes(60, 32), Spelling()
    write(tmp_path / "s", dishes)
    names = list(read_captions(tmp_path / "s"))
    assert names == [name for _, name in dishes]
    *_, done = write_caption_embeddings(tmp_path / "s", encoder, "spelling", batch=7)
    distinct = len(set(names)) + 1                                          # and the empty caption
    assert done == (distinct, distinct) and encoder.asked == distinct
    assert list(write_caption_embeddings(tmp_path / "s", encoder, "spelling")) == [] and encoder.asked == distinct
    stored = StoredCaptionEmbeddings(tmp_path / "s", "spelling")
    states, mask = stored([names[3], "", names[5]])
    expected, expected_mask = encoder([names[3], "", names[5]])
    assert torch.equal(mask, expected_mask) and stored.dim == 4 and torch.equal(states[mask], expected.half().float()[mask])
    write(tmp_path / "s", [(torch.zeros(3, 32, 32, dtype=torch.uint8), "新菜")])            # a store that has grown
    assert list(write_caption_embeddings(tmp_path / "s", encoder, "spelling")) == [(distinct + 1, distinct + 1)]
    assert len(ImageCaptionStore(tmp_path / "s")) == 61 and stored(["新菜"])[1].sum() == 3


def test_states_of_another_encoder_are_refused(tmp_path):
    write(tmp_path / "s", Dishes(3, 32))
    with pytest.raises(ValueError, match="no states of captions"):
        StoredCaptionEmbeddings(tmp_path / "s")
    for _ in write_caption_embeddings(tmp_path / "s", Spelling(), "old"):
        pass
    with pytest.raises(ValueError, match="encoder old, and this one is new"):
        list(write_caption_embeddings(tmp_path / "s", Spelling(), "new"))
    with pytest.raises(ValueError, match="encoder old, not of new"):
        StoredCaptionEmbeddings(tmp_path / "s", "new")
    with pytest.raises(KeyError, match="没有"):
        StoredCaptionEmbeddings(tmp_path / "s")(["没有"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        StoredCaptionEmbeddings(tmp_path / "nowhere")


def test_a_network_learns_the_same_from_stored_states(tmp_path):
    """Batches with the encoder and with its stored states are the same, and so is the training."""
    write(tmp_path / "s", Dishes(8, 32))
    for _ in write_caption_embeddings(tmp_path / "s", Spelling(), "spelling"):
        pass
    batches, weights = [torch.utils.data.default_collate([Dishes(8, 32)[i] for i in range(8)])], []
    for encoder in (Spelling(), StoredCaptionEmbeddings(tmp_path / "s"), Deaf()):
        torch.manual_seed(0)
        network = UNet(channels=(32,), context_dim=4, patch=4)
        diffusion = GaussianDiffusion(NoiseSchedule.cosine(100))
        for step in train(network, diffusion, batches, encoder, steps=8, learning_rate=1e-2, warmup=1, decay=0,
                          accelerator=Accelerator(mixed_precision="no")):
            pass
        weights.append(torch.cat([p.flatten() for p in network.parameters()]).detach().cpu())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-2)
    assert float((weights[0] - weights[2]).abs().max()) > 0.05              # other words, another network


def test_a_reader_follows_a_store_that_another_process_makes_grow(tmp_path):
    """From a few records to 30 MB, far beyond the map that the reader took at first."""
    write(tmp_path / "s", Dishes(4, 32))
    assert ImageCaptionStore(tmp_path / "s")[3][0].shape == (3, 32, 32)
    program = ("import sys, torch; from datasets.lmdb_store import append_records\n"
               "noise = torch.randint(256, (3, 256, 256), dtype=torch.uint8)\n"
               "for _ in append_records(sys.argv[1], ((noise, str(i)) for i in range(150))): pass")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")], check=True)
    store = ImageCaptionStore(tmp_path / "s")
    assert len(store) == 154 and store[153][1] == "149" and store[0][0].shape == (3, 32, 32)


def read_while_it_grows(folder, length, ready, answers):
    """Each time it looks, the last record that is there is whole and the right one."""
    dishes, seen = Dishes(length, 32), []
    ready.set()
    while not seen or seen[-1] < length:
        store = ImageCaptionStore(folder)
        picture, name = store[len(store) - 1]
        expected, expected_name = dishes[len(store) - 1]
        if not torch.equal(picture, expected) or name != expected_name:
            break
        seen.append(len(store))
    answers.put(seen)


def test_two_readers_and_a_writer_at_once(tmp_path):
    write(tmp_path / "s", Dishes(1, 32))
    fork = multiprocessing.get_context("fork")
    answers, ready = fork.Queue(), [fork.Event(), fork.Event()]
    readers = [fork.Process(target=read_while_it_grows, args=(tmp_path / "s", 300, event, answers)) for event in ready]
    for reader in readers:
        reader.start()
    for event in ready:
        assert event.wait(60)
    dishes = Dishes(300, 32)
    write(tmp_path / "s", (dishes[i] for i in range(1, 300)), per_transaction=3)
    for seen in (answers.get(timeout=60), answers.get(timeout=60)):
        assert seen == sorted(seen) and seen[-1] == 300 and len(set(seen)) > 3
    for reader in readers:
        reader.join(60)


def test_one_writes_and_reads_in_the_same_process_but_never_writes_twice(tmp_path):
    writing = append_records(tmp_path / "s", Dishes(40, 32), per_transaction=10)
    assert next(writing) == 1 and count_records(tmp_path / "s") == 10 and ImageCaptionStore(tmp_path / "s")[9][1] == Dishes(40, 32)[9][1]
    with pytest.raises(RuntimeError, match="being written to"):
        next(append_records(tmp_path / "s", Dishes(1, 32)))
    assert list(writing)[-1] == 40 and len(ImageCaptionStore(tmp_path / "s")) == 40
    writing = append_records(tmp_path / "s", Dishes(40, 32), per_transaction=10)
    next(writing)
    other = ("import sys; from datasets.lmdb_store import append_records; from datasets.dishes import Dishes\n"
             "list(append_records(sys.argv[1], Dishes(3, 32)))")
    subprocess.run([sys.executable, "-c", other, str(tmp_path / "s")], check=True)
    with pytest.raises(RuntimeError, match="another process is writing"):
        list(writing)
    store = ImageCaptionStore(tmp_path / "s")
    assert len(store) == 53 and all(store[i][0].shape == (3, 32, 32) for i in range(53))


def test_a_full_disk_is_named_and_what_was_written_stays_readable(tmp_path):
    """No file may grow beyond 2 MB in that process, for which the system gives the same kind of error as for a full disk."""
    program = ("import resource, sys; from datasets.lmdb_store import append_records; from datasets.dishes import Dishes\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))\n"
               "for n in append_records(sys.argv[1], Dishes(2000, 32), per_transaction=64): print(n)")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.returncode == 1 and f"OSError: {tmp_path}/s cannot be written to: " in done.stderr, done.stderr
    written, store, dishes = int(done.stdout.split()[-1]), ImageCaptionStore(tmp_path / "s"), Dishes(2000, 32)
    assert len(store) == written and 64 <= written < 500 and (tmp_path / "s" / "data.mdb").stat().st_size <= 2_000_000
    assert all(torch.equal(store[i][0], dishes[i][0]) for i in range(written))
    write(tmp_path / "s", [dishes[i] for i in range(written, 500)])         # there is room again
    assert len(ImageCaptionStore(tmp_path / "s")) == 500 and torch.equal(ImageCaptionStore(tmp_path / "s")[499][0], dishes[499][0])


def test_read_only_media_are_read(tmp_path):
    write(tmp_path / "s", Dishes(5, 32))
    for _ in write_caption_embeddings(tmp_path / "s", Spelling(), "spelling"):
        pass
    (tmp_path / "s" / "lock.mdb").unlink()                                  # as on a disc that was burned without it
    program = ("import sys; from datasets.lmdb_store import ImageCaptionStore; from datasets.caption_embeddings import StoredCaptionEmbeddings\n"
               "store = ImageCaptionStore(sys.argv[1])\n"
               "print([store[i][1] for i in range(5)], StoredCaptionEmbeddings(sys.argv[1])([''])[1].tolist())")
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    if os.geteuid() == 0:                                                   # root may write to a folder without permission, so mount it
        if not shutil.which("unshare"):
            pytest.skip("root, and no `unshare` to mount a folder read-only with")
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, str(tmp_path / "s"), *command]
        if subprocess.run([*command[:6], "true"], capture_output=True).returncode:
            pytest.skip("this system does not let one mount a folder read-only")
    else:
        (tmp_path / "s").chmod(0o555)
    done = subprocess.run(command, capture_output=True, text=True)
    (tmp_path / "s").chmod(0o755)
    assert done.returncode == 0 and str([name for _, name in Dishes(5, 32)]) in done.stdout, done.stderr
    assert not (tmp_path / "s" / "lock.mdb").exists()
