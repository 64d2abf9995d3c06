"""From photographs and tables to stores: whatever is damaged is named and skipped, and the rest arrives."""

import io
import json
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

import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from datasets import aipos_lmdb, lmdb_store, pokemon_lmdb
from datasets.aipos import AiposFood, find_finished_dish
from datasets.lmdb_store import ImageCaptionStore, count_records, read_headers
from datasets.pokemon_lmdb import PokemonLmdb

DATA = Path(__file__).parents[3] / "shared" / "data"


def picture(seed, size=(48, 40), mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode) if bands == 1 else Image.fromarray(pixels, mode=None if mode == "RGB" else mode)


def encoded(image, form="JPEG", **options):
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def bomb():
    """A PNG of 30,000 × 30,000 pixels in a few hundred bytes of header."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def bad_pictures(count_records):
    """name → the content of a file that is no picture, `count` of them, of ten kinds."""
    whole, png = encoded(picture(0)), encoded(picture(0), "PNG")
    kinds = [lambda i: ("half.jpg", whole[:len(whole) * (i % 60 + 20) // 100]),
             lambda i: ("half.png", png[:len(png) * (i % 60 + 20) // 100]), lambda i: ("empty.jpg", b""),
             lambda i: ("text.jpg", f"notes {i}".encode()), lambda i: ("noise.png", os.urandom(500 + i)),
             lambda i: ("bomb.png", bomb()), lambda i: ("strip.png", encoded(picture(i, (20_000, 10)), "PNG")),
             lambda i: ("pickle.jpg", pickle.dumps({"image": i})), lambda i: ("zeros.jpg", bytes(1000)),
             lambda i: ("header.jpg", whole[:20])]
    return {f"{i:03d}_{(made := kinds[i % len(kinds)](i))[0]}": made[1] for i in range(count_records)}


def odd_pictures():
    """name → the content of a file that is unusual, and a picture all the same."""
    frames = [picture(i, (30, 30)) for i in range(3)]
    return {"cmyk.jpg": encoded(picture(1).convert("CMYK")), "grey.png": encoded(picture(2, mode="L"), "PNG"),
            "alpha.png": encoded(picture(3).convert("RGBA"), "PNG"), "palette.gif": encoded(picture(4).convert("P"), "GIF"),
            "sixteen.png": encoded(Image.fromarray(np.full((20, 30), 40_000, np.uint16)), "PNG"),
            "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "one.png": encoded(picture(5, (1, 1)), "PNG"),
            "a_png_called.jpg": encoded(picture(6), "PNG"), "picture.webp": encoded(picture(7), "WEBP"), "upper.JPG": encoded(picture(8))}


@pytest.mark.filterwarnings("ignore")
def test_of_300_damaged_files_each_is_skipped_by_name_and_the_good_ones_arrive(tmp_path):
    folder, bad, odd = tmp_path / "food" / "番茄汤", bad_pictures(300), odd_pictures()
    folder.mkdir(parents=True)
    for name, content in (bad | odd).items():
        (folder / name).write_bytes(content)
    count_records, skipped = aipos_lmdb.build_store(tmp_path / "food", tmp_path / "store", size=16, show_progress=False)
    assert {Path(file).name for file in skipped} == bad.keys() and all(skipped.values())
    assert count_records == len(odd) == len(ImageCaptionStore(tmp_path / "store"))
    stored = {Path(header["file"]).name: i for i, header in enumerate(read_headers(tmp_path / "store"))}
    assert stored.keys() == odd.keys()
    store = ImageCaptionStore(tmp_path / "store")
    assert store[stored["sixteen.png"]][0].unique().tolist() == [156]       # the upper eight bits of 40,000
    assert all(store[i][0].shape == (3, 16, 16) for i in range(count_records))


def test_the_store_holds_what_the_folder_gives(tmp_path):
    for dish in ("番茄汤", "土豆丝"):
        (tmp_path / "food" / dish).mkdir(parents=True)
        for i in range(3):
            picture(i).save(tmp_path / "food" / dish / f"{i}.jpg")
    count_records, skipped = aipos_lmdb.build_store(tmp_path / "food", tmp_path / "store", size=32, show_progress=False)
    food, store = AiposFood(tmp_path / "food", 32), aipos_lmdb.AiposFoodLmdb(tmp_path / "store")
    assert count_records == len(food) == 6 and not skipped
    for (a, name), (b, same) in zip(food, store):
        assert torch.equal(a, b) and name == same
    mirrored = aipos_lmdb.AiposFoodLmdb(tmp_path / "store", flip=True)
    torch.manual_seed(0)
    seen = [mirrored[0][0] for _ in range(30)]
    as_it_is, turned = (sum(torch.equal(picture, wanted) for picture in seen) for wanted in (food[0][0], food[0][0].flip(2)))
    assert as_it_is + turned == 30 and min(as_it_is, turned) > 5
    with pytest.raises(ValueError, match="other settings, {'size': 32}, not {'size': 64}"):
        aipos_lmdb.build_store(tmp_path / "food", tmp_path / "store", size=64, show_progress=False)


def build_and_count(photos, store, opened):
    """In a process of its own: small transactions; it says how many photographs it has opened."""
    at_once, open_photograph = lmdb_store.append_records, aipos_lmdb.load_photo

    def counted(*arguments, **options):
        opened.value += 1
        return open_photograph(*arguments, **options)

    lmdb_store.append_records = lambda folder, records: at_once(folder, records, per_transaction=8)
    aipos_lmdb.load_photo = counted
    aipos_lmdb.build_store(photos, store, 32, show_progress=False)


def test_killed_at_20_random_moments_it_is_the_store_that_is_built_in_one_go(tmp_path):
    folder, random, fork = tmp_path / "food" / "番茄汤", np.random.default_rng(0), multiprocessing.get_context("fork")
    folder.mkdir(parents=True)
    for i in range(400):
        (folder / f"{i:04d}.jpg").write_bytes(encoded(picture(i)))
    (folder / "0100.jpg").write_bytes(b"no picture")
    aipos_lmdb.build_store(tmp_path / "food", tmp_path / "whole", size=32, show_progress=False)
    moments = []
    for _ in range(20):
        opened = fork.Value("i", 0)
        process = fork.Process(target=build_and_count, args=(tmp_path / "food", tmp_path / "store", opened))
        process.start()
        until = int(random.integers(1, 40))
        while opened.value < until and process.is_alive():
            time.sleep(0.0005)
        time.sleep(float(random.uniform(0.0, 0.01)))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        moments.append(count_records(tmp_path / "store"))
    assert moments == sorted(moments) and len({moment for moment in moments if 0 < moment < 399}) >= 3, moments
    total, skipped = aipos_lmdb.build_store(tmp_path / "food", tmp_path / "store", size=32, show_progress=False)
    assert total == 399 and [Path(file).name for file in skipped] == ["0100.jpg"]
    contents = []
    for name in ("whole", "store"):
        with lmdb.open(str(tmp_path / name), readonly=True, lock=False) as environment, environment.begin() as transaction:
            contents.append(list(transaction.cursor()))
    assert contents[0] == contents[1]


def test_the_finished_dish_is_chosen_among_the_steps(tmp_path):
    def dish(name, files, recipe=""):
        folder = tmp_path / "dishes" / "热菜" / name
        folder.mkdir(parents=True)
        for i, file in enumerate(files):
            picture(i).save(folder / file)
        (folder / f"{name}.md").write_text(recipe, encoding="utf-8")
        return find_finished_dish(folder).name
    assert dish("番茄汤", ["1.jpg", "成品.jpg", "步骤2.jpg"]) == "成品.jpg"
    assert dish("土豆丝", ["切丝1.jpg", "土豆丝.jpg", "a.jpg"]) == "土豆丝.jpg"
    assert dish("红烧肉", ["1.jpg", "2.jpg", "3.jpg"], "![切肉](./1.jpg)\n![红烧肉成品](./2.jpg)") == "2.jpg"
    assert dish("炒面", ["1.jpg", "2.jpg"], "![样子](2.jpg) ![和面](1.jpg)") == "2.jpg"
    assert dish("米饭", ["1.jpg", "rice.jpg", "step.jpg"]) == "rice.jpg"
    assert dish("馒头", ["1.jpg", "9.jpg", "10.jpg"], "![成品]( )") == "10.jpg"
    assert dish("馄饨", ["①1.jpg", "②2.jpg"]) == "②2.jpg"
    food = AiposFood(tmp_path, 16)
    assert sorted(food.captions) == sorted(["番茄汤", "土豆丝", "红烧肉", "炒面", "米饭", "馒头", "馄饨"]) and len(food) == 7


def test_a_split_follows_the_files_content_not_their_order(tmp_path):
    for i in range(60):
        (tmp_path / "a" / str(i % 5)).mkdir(parents=True, exist_ok=True)
        picture(i, (20, 20)).save(tmp_path / "a" / str(i % 5) / f"{i}.png")
    train, test = (AiposFood(tmp_path / "a", 16, split=split, held_out=0.3) for split in ("train", "test"))
    assert not set(train.files) & set(test.files) and len(train) + len(test) == 60 and 8 < len(test) < 30
    held = {file.read_bytes() for file in test.files}
    shutil.copytree(tmp_path / "a" / "3", tmp_path / "b" / "renamed")
    assert {file.read_bytes() for file in AiposFood(tmp_path / "b", 16, split="test", held_out=0.3).files} == {
        content for content in held if any(content == file.read_bytes() for file in (tmp_path / "a" / "3").iterdir())}
    with pytest.raises(ValueError, match="'valid'"):
        AiposFood(tmp_path / "a", split="valid")


def test_a_random_crop_moves_and_stays_inside(tmp_path):
    (tmp_path / "汤").mkdir()
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, 90).astype(np.uint8)             # brighter from left to right
    Image.fromarray(pixels).save(tmp_path / "汤" / "1.png")
    food = AiposFood(tmp_path, 30, crop="random")
    torch.manual_seed(0)
    means = [float(food[0][0][0].float().mean()) for _ in range(20)]
    assert max(means) - min(means) > 60 and float(AiposFood(tmp_path, 30)[0][0][0].float().mean()) == pytest.approx(127.5, abs=2)


def table(folder, form, rows):
    folder.mkdir(exist_ok=True)
    path = folder / f"table.{form}"
    if form == "csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_tables_of_pictures_and_captions(form, tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    rows = [{"file_name": f"{i}.png", "en_text": f"no {i}", "zh_text": f"第{i}只"} for i in range(3)]
    rows += [{"file_name": "bad.png", "en_text": "x", "zh_text": "坏的"}, {"file_name": "1.png", "en_text": "y", "zh_text": "  "},
             {"file_name": "nowhere.png", "en_text": "z", "zh_text": "没有"}]
    if form == "parquet":
        for row in rows:
            file = tmp_path / row.pop("file_name")
            row["image"] = {"bytes": file.read_bytes() if file.exists() else None, "path": None}
        path = tmp_path / "table.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = table(tmp_path, form, rows)
    count_records, skipped = pokemon_lmdb.build_store(path, tmp_path / "store", size=24, caption="zh_text", show_progress=False)
    assert count_records == 3 and len(skipped) == 3
    reasons = " / ".join(skipped.values())
    assert "cannot identify" in reasons and "no caption in column zh_text" in reasons
    assert ("no picture" in reasons) if form == "parquet" else ("No such file" in reasons)
    store = PokemonLmdb(tmp_path / "store")
    assert [store[i][1] for i in range(3)] == ["第0只", "第1只", "第2只"] and store[0][0].shape == (3, 24, 24)
    with pytest.raises(ValueError, match="has no column text; it has .*zh_text"):
        pokemon_lmdb.build_store(path, tmp_path / "other", show_progress=False)


def bad_rows(count_records):
    """(what is wrong, line of a .csv with the columns file_name, text; line of a .jsonl), `count` of them, of seven kinds."""
    kinds = [lambda i: ("No such file", f"nowhere{i}.png,第{i}只".encode(), {"file_name": f"nowhere{i}.png", "text": f"第{i}只"}),
             lambda i: ("no caption", b"good.png,  ", {"file_name": "good.png", "text": " "}),
             lambda i: ("no caption", b"good.png", {"file_name": "good.png"}),
             lambda i: ("no picture", f",第{i}只".encode(), {"file_name": None, "text": f"第{i}只"}),
             lambda i: ("not UTF-8", f"good.png,第{i}只".encode("gbk"), f'{{"file_name": "good.png", "text": "第{i}只"}}'.encode("gbk")),
             lambda i: ("several lines", f'good.png,"第{i}\n只"'.encode(), {"file_name": "good.png", "text": f"第{i}\n只"}),
             lambda i: ("cannot identify", f"bad.png,第{i}只".encode(), {"file_name": "bad.png", "text": f"第{i}只"})]
    for i in range(count_records):
        says, csv_line, row = kinds[i % len(kinds)](i)
        yield says, csv_line, row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_of_300_damaged_rows_each_is_skipped_with_its_reason_and_the_good_ones_arrive(form, tmp_path):
    picture(0).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    rows, lines = list(bad_rows(300)), [b"file_name,text"] if form == "csv" else []
    for i, (_, csv_line, json_line) in enumerate(rows):
        lines.append(csv_line if form == "csv" else json_line)
        if i % 30 == 0:
            lines.append(f"good.png,好的{i}".encode() if form == "csv" else f'{{"file_name": "good.png", "text": "好的{i}"}}'.encode())
    if form == "jsonl":
        lines += [b'{"file_name": "good.png", "te', b'["good.png", "x"]']   # cut off, and no object
        rows += [("no JSON", b"", b""), ("no JSON object", b"", b"")]
    (tmp_path / f"t.{form}").write_bytes(b"\n".join(lines))
    total, skipped = pokemon_lmdb.build_store(tmp_path / f"t.{form}", tmp_path / "store", size=8, show_progress=False)
    assert total == 10 and [header["caption"] for header in read_headers(tmp_path / "store")] == [f"好的{i}" for i in range(0, 300, 30)]
    assert len(skipped) == len(rows)
    for (says, *_), reason in zip(rows, skipped.values()):
        assert says in reason


def test_tables_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "other.csv").write_bytes("文件,说明\n1.png,汤\n".encode("gbk"))
    (tmp_path / "quote.csv").write_bytes(b'file_name,text\n1.png,"never closed\n' + b"x" * 200_000)
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    (tmp_path / "noise.parquet").write_bytes(os.urandom(500))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name, kind, says in (("other.csv", ValueError, "other.csv has no column text; it has .*\ufffd"),
                             ("empty.jsonl", ValueError, "it has none"), ("noise.parquet", ValueError, "noise.parquet is damaged"),
                             ("quote.csv", ValueError, "quote.csv, line .: field larger"),
                             ("table.xlsx", ValueError, "not table.xlsx"), ("none.csv", FileNotFoundError, "no table")):
        with pytest.raises(kind, match=says):
            pokemon_lmdb.build_store(tmp_path / name, tmp_path / "store", show_progress=False)


def test_two_captions_of_a_picture_and_two_tables_all_arrive(tmp_path):
    picture(0).save(tmp_path / "1.png")
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text(f"file_name,text\n1.png,{name} 甲\n1.png,{name} 乙\n", encoding="utf-8")
        for _ in range(2):                                                  # the second time there is nothing left to do
            total, skipped = pokemon_lmdb.build_store(tmp_path / f"{name}.csv", tmp_path / "store", size=8, show_progress=False)
            assert not skipped
    assert total == 4
    assert [header["caption"] for header in read_headers(tmp_path / "store")] == ["one 甲", "one 乙", "two 甲", "two 乙"]


def test_a_picture_is_known_by_its_content_not_by_its_name(tmp_path):
    for folder, seed in (("a", 0), ("b", 1)):                               # two tables of one name, with files of one name
        (tmp_path / folder).mkdir()
        picture(seed).save(tmp_path / folder / "1.png")
        rows = [{"file_name": "1.png", "text": "汤"}, {"file_name": "1.png", "text": "汤"}]
        total, skipped = pokemon_lmdb.build_store(table(tmp_path / folder, "csv", rows), tmp_path / "store", size=8, show_progress=False)
        assert list(skipped.values()) == ["the same picture and caption as table.csv, row 1: 1.png"]
    assert total == 2
    picture(2).save(tmp_path / "b" / "2.png")                               # a row is inserted above
    rows = [{"file_name": "2.png", "text": "面"}, {"file_name": "1.png", "text": "汤"}]
    assert pokemon_lmdb.build_store(table(tmp_path / "b", "csv", rows), tmp_path / "store", size=8, show_progress=False)[0] == 3


def test_names_that_are_not_utf_8_are_skipped_and_the_rest_arrives(tmp_path):
    (tmp_path / "food" / "汤").mkdir(parents=True)
    picture(0).save(tmp_path / "food" / "汤" / "1.jpg")
    odd = os.fsencode(tmp_path / "food") + b"/" + "汤".encode("gbk")        # as a foreign archive unpacks it
    os.mkdir(odd)
    shutil.copy(tmp_path / "food" / "汤" / "1.jpg", os.fsdecode(odd + b"/2.jpg"))
    total, skipped = aipos_lmdb.build_store(tmp_path / "food", tmp_path / "store", size=8, show_progress=False)
    assert total == 1 and len(skipped) == 1 and "surrogates not allowed" in "".join(skipped.values())
    print(*skipped)                                                         # which a terminal can show


def test_a_store_goes_on_from_whichever_folder_one_calls_it(tmp_path, monkeypatch):
    (tmp_path / "food" / "汤").mkdir(parents=True)
    picture(0).save(tmp_path / "food" / "汤" / "1.jpg")
    assert aipos_lmdb.build_store(tmp_path / "food", tmp_path / "store", size=8, show_progress=False)[0] == 1
    monkeypatch.chdir(tmp_path)
    assert aipos_lmdb.build_store("food", "store", size=8, show_progress=False)[0] == 1


def test_broken_notes_of_a_camera_do_not_cost_the_picture(tmp_path, monkeypatch):
    def broken(image):
        raise struct.error("unpack requires a buffer of 4 bytes")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    (tmp_path / "汤").mkdir()
    pixels = np.full((20, 20, 3), 90, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "汤" / "1.png")
    food = AiposFood(tmp_path, 16)
    assert len(food) == 1 and (food[0][0] == 90).all()


def test_transparent_pictures_stand_on_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "1.png")
    path = table(tmp_path, "csv", [{"file_name": "1.png", "text": "空"}])
    pokemon_lmdb.build_store(path, tmp_path / "store", size=8, show_progress=False)
    assert (PokemonLmdb(tmp_path / "store")[0][0] == 255).all()


@pytest.mark.parametrize("module, source", [("aipos_lmdb", "food"), ("pokemon_lmdb", "table.csv")])
def test_one_command_builds_a_store_and_says_what_it_skipped(module, source, tmp_path):
    arguments = source, "store", "--size", "16"
    (tmp_path / "food" / "番茄汤").mkdir(parents=True)
    picture(0).save(tmp_path / "food" / "番茄汤" / "1.jpg")
    (tmp_path / "food" / "番茄汤" / "2.jpg").write_bytes(b"nothing")
    table(tmp_path, "csv", [{"file_name": "food/番茄汤/1.jpg", "text": "番茄汤"}, {"file_name": "food/番茄汤/2.jpg", "text": "番茄汤"}])
    root = Path(__file__).parents[2]
    def run(*words):
        return subprocess.run([sys.executable, "-m", f"datasets.{module}", *words], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(root)})
    done = run(*arguments)
    assert done.returncode == 0 and "1 pictures in store, 1 " in done.stdout and "2.jpg: cannot identify" in done.stdout, done.stderr
    assert run(*arguments).stdout.startswith("skipped") and len(ImageCaptionStore(tmp_path / "store")) == 1
    assert "--size" in run("--help").stdout
    wrong = run("nowhere", "store2")
    assert wrong.returncode == 2 and "nowhere" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real pictures at {DATA}")
def test_real_pictures_arrive(tmp_path):
    count_records, skipped = aipos_lmdb.build_store(DATA / "howtocook", tmp_path / "food", size=64, show_progress=False)
    assert count_records > 140 and not skipped
    count_records, skipped = pokemon_lmdb.build_store(DATA / "creatures" / "metadata.csv", tmp_path / "creatures", size=64, caption="zh_text", show_progress=False)
    assert count_records > 100 and not skipped and "老鼠" in [header["caption"] for header in read_headers(tmp_path / "creatures")]
