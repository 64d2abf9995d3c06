"""From photographs to stores: what is damaged is skipped by name, and the rest is stored."""

import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import aipos_lmdb, lmdb_store
from datasets.aipos import AiposFood, find_finished_dish
from datasets.lmdb_store import ImageCaptionStore, count_records, read_headers

from .example_files import encode_image, random_image, read_lmdb, write_table

DATA = Path(__file__).parents[3] / "shared" / "data"


def build(photos, store, size):
    return aipos_lmdb.build_store(photos, store, size=size, show_progress=False)


def decompression_bomb() -> bytes:
    """A PNG that declares 30,000 × 30,000 pixels in a file of a few dozen bytes."""

    def chunk(name, content):
        length = struct.pack(">I", len(content))
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return length + name + content + checksum

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def damaged_files(count: int) -> dict[str, bytes]:
    """File name → content: files of ten kinds that are damaged or not photographs."""
    jpeg = encode_image(random_image(0))
    png = encode_image(random_image(0), "PNG")
    files = {}
    for i in range(count):
        percent = i % 60 + 20
        kinds = [
            ("half.jpg", jpeg[: len(jpeg) * percent // 100]),
            ("half.png", png[: len(png) * percent // 100]),
            ("empty.jpg", b""),
            ("text.jpg", f"notes {i}".encode()),
            ("noise.png", os.urandom(500 + i)),
            ("bomb.png", decompression_bomb()),
            ("elongated.png", None),
            ("pickle.jpg", pickle.dumps({"image": i})),
            ("zeros.jpg", bytes(1000)),
            ("header.jpg", jpeg[:20]),
        ]
        name, content = kinds[i % len(kinds)]
        if content is None:
            content = encode_image(random_image(i, (20_000, 10)), "PNG")
        files[f"{i:03d}_{name}"] = content
    return files


def unusual_images() -> dict[str, bytes]:
    """File name → content: files of unusual forms that are images nevertheless."""
    frames = [random_image(i, (30, 30)) for i in range(3)]
    sixteen_bits = Image.fromarray(np.full((20, 30), 40_000, np.uint16))
    return {
        "cmyk.jpg": encode_image(random_image(1).convert("CMYK")),
        "grey.png": encode_image(random_image(2, mode="L"), "PNG"),
        "alpha.png": encode_image(random_image(3).convert("RGBA"), "PNG"),
        "palette.gif": encode_image(random_image(4).convert("P"), "GIF"),
        "sixteen.png": encode_image(sixteen_bits, "PNG"),
        "animated.gif": encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "one_pixel.png": encode_image(random_image(5, (1, 1)), "PNG"),
        "a_png_called.jpg": encode_image(random_image(6), "PNG"),
        "image.webp": encode_image(random_image(7), "WEBP"),
        "upper.JPG": encode_image(random_image(8)),
    }


@pytest.mark.filterwarnings("ignore")
def test_300_damaged_files_are_skipped_by_name_and_all_images_are_stored(tmp_path):
    damaged = damaged_files(300)
    unusual = unusual_images()
    folder = tmp_path / "food" / "番茄汤"
    folder.mkdir(parents=True)
    for name, content in (damaged | unusual).items():
        (folder / name).write_bytes(content)
    count, skipped = build(tmp_path / "food", tmp_path / "store", size=16)
    assert {Path(file).name for file in skipped} == damaged.keys()
    assert all(skipped.values()), "each has a reason"

    store = ImageCaptionStore(tmp_path / "store")
    assert count == len(unusual) == len(store)
    names = [Path(header["file"]).name for header in read_headers(tmp_path / "store")]
    assert set(names) == unusual.keys()
    sixteen_bits, _ = store[names.index("sixteen.png")]
    assert sixteen_bits.unique().tolist() == [156]  # the upper eight bits of 40,000
    assert all(store[i][0].shape == (3, 16, 16) for i in range(count))


def test_the_store_equals_the_dataset_of_the_folder(tmp_path):
    for dish in ("番茄汤", "土豆丝"):
        (tmp_path / "food" / dish).mkdir(parents=True)
        for i in range(3):
            random_image(i).save(tmp_path / "food" / dish / f"{i}.jpg")
    count, skipped = build(tmp_path / "food", tmp_path / "store", size=32)
    food = AiposFood(tmp_path / "food", 32)
    store = aipos_lmdb.AiposFoodLmdb(tmp_path / "store")
    assert count == len(food) == 6
    assert not skipped
    for (image, name), (stored_image, stored_name) in zip(food, store):
        assert torch.equal(image, stored_image)
        assert name == stored_name

    flipping = aipos_lmdb.AiposFoodLmdb(tmp_path / "store", flip=True)
    torch.manual_seed(0)
    images = [flipping[0][0] for _ in range(30)]
    original = food[0][0]
    unflipped_count = sum(torch.equal(image, original) for image in images)
    flipped_count = sum(torch.equal(image, original.flip(2)) for image in images)
    assert unflipped_count + flipped_count == 30
    assert min(unflipped_count, flipped_count) > 5
    with pytest.raises(ValueError, match="other settings, {'size': 32}, not {'size': 64}"):
        build(tmp_path / "food", tmp_path / "store", size=64)


def build_and_count(photos, store, opened):
    """Build a store in small transactions and count the photographs that have been opened.

    Runs in a process of its own, so that it may replace functions of the modules.
    """
    append_records = lmdb_store.append_records
    load_photo = aipos_lmdb.load_photo

    def append_in_small_transactions(folder, records):
        return append_records(folder, records, per_transaction=8)

    def load_and_count(*arguments, **options):
        opened.value += 1
        return load_photo(*arguments, **options)

    lmdb_store.append_records = append_in_small_transactions
    aipos_lmdb.load_photo = load_and_count
    build(photos, store, size=32)


def test_a_store_that_was_killed_20_times_equals_one_built_without_interruption(tmp_path):
    folder = tmp_path / "food" / "番茄汤"
    folder.mkdir(parents=True)
    for i in range(400):
        (folder / f"{i:04d}.jpg").write_bytes(encode_image(random_image(i)))
    (folder / "0100.jpg").write_bytes(b"not an image")
    build(tmp_path / "food", tmp_path / "uninterrupted", size=32)

    rng = np.random.default_rng(0)
    fork = multiprocessing.get_context("fork")
    counts = []
    for _ in range(20):
        opened = fork.Value("i", 0)
        arguments = (tmp_path / "food", tmp_path / "store", opened)
        process = fork.Process(target=build_and_count, args=arguments)
        process.start()
        kill_after = int(rng.integers(1, 40))
        while opened.value < kill_after and process.is_alive():
            time.sleep(0.0005)
        time.sleep(float(rng.uniform(0.0, 0.01)))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        counts.append(count_records(tmp_path / "store"))
    assert counts == sorted(counts), counts
    assert len({count for count in counts if 0 < count < 399}) >= 3, counts

    total, skipped = build(tmp_path / "food", tmp_path / "store", size=32)
    assert total == 399
    assert [Path(file).name for file in skipped] == ["0100.jpg"]
    assert read_lmdb(tmp_path / "uninterrupted") == read_lmdb(tmp_path / "store")


def test_the_finished_dish_is_chosen_among_the_steps(tmp_path):
    def chosen(name, files, recipe=""):
        folder = tmp_path / "dishes" / "热菜" / name
        folder.mkdir(parents=True)
        for i, file in enumerate(files):
            random_image(i).save(folder / file)
        (folder / f"{name}.md").write_text(recipe, encoding="utf-8")
        return find_finished_dish(folder).name

    assert chosen("番茄汤", ["1.jpg", "成品.jpg", "步骤2.jpg"]) == "成品.jpg"
    assert chosen("土豆丝", ["切丝1.jpg", "土豆丝.jpg", "a.jpg"]) == "土豆丝.jpg"
    recipe = "![切肉](./1.jpg)\n![红烧肉成品](./2.jpg)"
    assert chosen("红烧肉", ["1.jpg", "2.jpg", "3.jpg"], recipe) == "2.jpg"
    assert chosen("炒面", ["1.jpg", "2.jpg"], "![样子](2.jpg) ![和面](1.jpg)") == "2.jpg"
    assert chosen("米饭", ["1.jpg", "rice.jpg", "step.jpg"]) == "rice.jpg"
    assert chosen("馒头", ["1.jpg", "9.jpg", "10.jpg"], "![成品]( )") == "10.jpg"
    assert chosen("馄饨", ["①1.jpg", "②2.jpg"]) == "②2.jpg"
    food = AiposFood(tmp_path, 16)
    names = ["番茄汤", "土豆丝", "红烧肉", "炒面", "米饭", "馒头", "馄饨"]
    assert sorted(food.captions) == sorted(names)
    assert len(food) == 7


def test_the_split_depends_on_the_content_of_a_file_not_on_its_name(tmp_path):
    for i in range(60):
        folder = tmp_path / "all" / str(i % 5)
        folder.mkdir(parents=True, exist_ok=True)
        random_image(i, (20, 20)).save(folder / f"{i}.png")
    train = AiposFood(tmp_path / "all", 16, split="train", test_fraction=0.3)
    test = AiposFood(tmp_path / "all", 16, split="test", test_fraction=0.3)
    assert not set(train.files) & set(test.files)
    assert len(train) + len(test) == 60
    assert 8 < len(test) < 30

    # One folder alone, renamed: its test files are the same.
    shutil.copytree(tmp_path / "all" / "3", tmp_path / "part" / "renamed")
    test_of_part = AiposFood(tmp_path / "part", 16, split="test", test_fraction=0.3)
    test_contents = {file.read_bytes() for file in test.files}
    part_contents = {file.read_bytes() for file in (tmp_path / "all" / "3").iterdir()}
    assert {file.read_bytes() for file in test_of_part.files} == test_contents & part_contents
    with pytest.raises(ValueError, match="'valid'"):
        AiposFood(tmp_path / "all", split="valid")


def test_a_random_crop_varies_and_a_centre_crop_is_centred(tmp_path):
    (tmp_path / "汤").mkdir()
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, 90).astype(np.uint8)  # brighter from left to right
    Image.fromarray(pixels).save(tmp_path / "汤" / "1.png")

    def mean_red(food):
        image, _ = food[0]
        return float(image[0].float().mean())

    randomly_cropped = AiposFood(tmp_path, 30, crop="random")
    torch.manual_seed(0)
    means = [mean_red(randomly_cropped) for _ in range(20)]
    assert max(means) - min(means) > 60
    assert mean_red(AiposFood(tmp_path, 30)) == pytest.approx(127.5, abs=2)


def test_names_that_are_not_utf_8_are_skipped_and_the_rest_is_stored(tmp_path):
    (tmp_path / "food" / "汤").mkdir(parents=True)
    random_image(0).save(tmp_path / "food" / "汤" / "1.jpg")
    # A folder name in the encoding GBK, as archives from Chinese Windows contain it.
    gbk_folder = os.fsencode(tmp_path / "food") + b"/" + "汤".encode("gbk")
    os.mkdir(gbk_folder)
    shutil.copy(tmp_path / "food" / "汤" / "1.jpg", os.fsdecode(gbk_folder + b"/2.jpg"))
    total, skipped = build(tmp_path / "food", tmp_path / "store", size=8)
    assert total == 1
    assert len(skipped) == 1
    assert "surrogates not allowed" in "".join(skipped.values())
    print(*skipped)  # raises if a name cannot be printed


def test_a_store_is_resumed_whatever_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "food" / "汤").mkdir(parents=True)
    random_image(0).save(tmp_path / "food" / "汤" / "1.jpg")
    count, _ = build(tmp_path / "food", tmp_path / "store", size=8)
    assert count == 1
    monkeypatch.chdir(tmp_path)
    count, _ = build("food", "store", size=8)
    assert count == 1


def test_an_image_with_damaged_exif_data_is_read(tmp_path, monkeypatch):
    def raise_error(image):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", raise_error)
    (tmp_path / "汤").mkdir()
    pixels = np.full((20, 20, 3), 90, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "汤" / "1.png")
    food = AiposFood(tmp_path, 16)
    assert len(food) == 1
    assert (food[0][0] == 90).all()


@pytest.mark.parametrize("module, source", [
    ("aipos_lmdb", "food"), ("table_lmdb", "table.csv"), ("pokemon_lmdb", "table.csv"),
])
def test_the_command_builds_a_store_and_reports_what_it_skipped(module, source, tmp_path):
    (tmp_path / "food" / "番茄汤").mkdir(parents=True)
    random_image(0).save(tmp_path / "food" / "番茄汤" / "1.jpg")
    (tmp_path / "food" / "番茄汤" / "2.jpg").write_bytes(b"not an image")
    rows = [{"file_name": f"food/番茄汤/{i}.jpg", "text": "番茄汤"} for i in (1, 2)]
    write_table(tmp_path, "csv", rows)
    root = Path(__file__).parents[2]

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", f"datasets.{module}", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        )

    arguments = (source, "store", "--size", "16")
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "1 images in store, 1 " in first.stdout
    assert "2.jpg: cannot identify" in first.stdout
    second = run(*arguments)
    assert second.stdout.startswith("skipped")
    assert len(ImageCaptionStore(tmp_path / "store")) == 1
    assert "--size" in run("--help").stdout
    failed = run("nowhere", "store2")
    assert failed.returncode == 2
    assert "nowhere" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no photographs at {DATA}")
def test_real_photographs_are_all_stored(tmp_path):
    count, skipped = build(DATA / "howtocook", tmp_path / "food", size=64)
    assert count > 140
    assert not skipped
