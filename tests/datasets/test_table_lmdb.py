"""From tables to stores: unusable rows are skipped with a reason, and the rest is stored."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from datasets import table_lmdb
from datasets.lmdb_store import read_captions
from datasets.pokemon_lmdb import PokemonLmdb

from .example_files import random_image, write_table

DATA = Path(__file__).parents[3] / "shared" / "data"


def build(table, store, size=8, **options):
    return table_lmdb.build_store(table, store, size=size, show_progress=False, **options)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_of_images_and_captions(suffix, tmp_path):
    for i in range(3):
        random_image(i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    rows = [
        {"file_name": f"{i}.png", "en_text": f"no {i}", "zh_text": f"第{i}只"} for i in range(3)
    ]
    rows += [
        {"file_name": "bad.png", "en_text": "x", "zh_text": "坏的"},
        {"file_name": "1.png", "en_text": "y", "zh_text": "  "},
        {"file_name": "nowhere.png", "en_text": "z", "zh_text": "没有"},
    ]
    if suffix == "parquet":
        for row in rows:
            file = tmp_path / row.pop("file_name")
            row["image"] = {"bytes": file.read_bytes() if file.exists() else None, "path": None}
        path = tmp_path / "table.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = write_table(tmp_path, suffix, rows)

    count, skipped = build(path, tmp_path / "store", size=24, caption_column="zh_text")
    assert count == 3
    assert len(skipped) == 3
    reasons = " / ".join(skipped.values())
    assert "cannot identify" in reasons
    assert "no caption in column zh_text" in reasons
    assert ("no image" if suffix == "parquet" else "No such file") in reasons
    store = PokemonLmdb(tmp_path / "store")
    assert [store[i][1] for i in range(3)] == ["第0只", "第1只", "第2只"]
    assert store[0][0].shape == (3, 24, 24)
    with pytest.raises(ValueError, match="has no column text; it has .*zh_text"):
        build(path, tmp_path / "other")


def bad_rows(count: int):
    """Yield (reason, line of a .csv file, line of a .jsonl file) for rows of seven kinds.

    The columns are file_name and text.
    """
    for i in range(count):
        caption = f"第{i}只"
        gbk_json = f'{{"file_name": "good.png", "text": "{caption}"}}'.encode("gbk")
        kinds = [
            (
                "No such file",
                f"nowhere{i}.png,{caption}".encode(),
                {"file_name": f"nowhere{i}.png", "text": caption},
            ),
            ("no caption", b"good.png,  ", {"file_name": "good.png", "text": " "}),
            ("no caption", b"good.png", {"file_name": "good.png"}),
            ("no image", f",{caption}".encode(), {"file_name": None, "text": caption}),
            ("not UTF-8", f"good.png,{caption}".encode("gbk"), gbk_json),
            ("several lines", f'good.png,"第{i}\n只"'.encode(), {"file_name": "good.png"}),
            (
                "cannot identify",
                f"bad.png,{caption}".encode(),
                {"file_name": "bad.png", "text": caption},
            ),
        ]
        reason, csv_line, row = kinds[i % len(kinds)]
        if isinstance(row, dict):
            row = json.dumps(row, ensure_ascii=False).encode()
        yield reason, csv_line, row


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_300_bad_rows_are_skipped_with_their_reason_and_all_good_rows_are_stored(suffix, tmp_path):
    random_image(0).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    lines = [b"file_name,text"] if suffix == "csv" else []
    expected_reasons = []
    for i, (reason, csv_line, json_line) in enumerate(bad_rows(300)):
        lines.append(csv_line if suffix == "csv" else json_line)
        # Of these formats, only .csv cannot have captions of several lines.
        is_lines = suffix == "jsonl" and reason == "several lines"
        expected_reasons.append("no caption" if is_lines else reason)
        if i % 30 == 0:  # a good row
            good_csv = f"good.png,好的{i}"
            good_json = f'{{"file_name": "good.png", "text": "好的{i}"}}'
            lines.append((good_csv if suffix == "csv" else good_json).encode())
    if suffix == "jsonl":
        lines.append(b'{"file_name": "good.png", "te')  # incomplete
        lines.append(b'["good.png", "x"]')
        expected_reasons += ["invalid JSON", "not a JSON object"]
    table = tmp_path / f"table.{suffix}"
    table.write_bytes(b"\n".join(lines))

    total, skipped = build(table, tmp_path / "store")
    assert total == 10
    assert list(read_captions(tmp_path / "store")) == [f"好的{i}" for i in range(0, 300, 30)]
    assert len(skipped) == len(expected_reasons)
    for expected_reason, reason in zip(expected_reasons, skipped.values()):
        assert expected_reason in reason


def test_errors_name_tables_that_cannot_be_read(tmp_path):
    (tmp_path / "other.csv").write_bytes("文件,说明\n1.png,汤\n".encode("gbk"))
    (tmp_path / "quote.csv").write_bytes(b'file_name,text\n1.png,"never closed\n' + b"x" * 200_000)
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    (tmp_path / "noise.parquet").write_bytes(os.urandom(500))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name, error, message in (
        ("other.csv", ValueError, "other.csv has no column text; it has 文件, 说明"),
        ("empty.jsonl", ValueError, "it has none"),
        ("noise.parquet", ValueError, "noise.parquet is damaged"),
        ("quote.csv", ValueError, "quote.csv, line .: field larger"),
        ("table.xlsx", ValueError, "not table.xlsx"),
        ("none.csv", FileNotFoundError, "no table"),
    ):
        with pytest.raises(error, match=message):
            build(tmp_path / name, tmp_path / "store", size=128)


def test_two_captions_per_image_and_two_tables_are_all_stored(tmp_path):
    random_image(0).save(tmp_path / "1.png")
    for name in ("one", "two"):
        table = tmp_path / f"{name}.csv"
        content = f"file_name,text\n1.png,{name} 甲\n1.png,{name} 乙\n"
        table.write_text(content, encoding="utf-8")
        for _ in range(2):  # the second call has nothing to add
            total, skipped = build(table, tmp_path / "store")
            assert not skipped
    assert total == 4
    captions = list(read_captions(tmp_path / "store"))
    assert captions == ["one 甲", "one 乙", "two 甲", "two 乙"]


def test_a_record_is_identified_by_its_content_not_by_its_name(tmp_path):
    # Two tables and two files of the same names: their content is different.
    rows = [{"file_name": "1.png", "text": "汤"}, {"file_name": "1.png", "text": "汤"}]
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        random_image(seed).save(tmp_path / folder / "1.png")
        table = write_table(tmp_path / folder, "csv", rows)
        total, skipped = build(table, tmp_path / "store")
        assert list(skipped.values()) == ["the same image and caption as table.csv, row 1: 1.png"]
    assert total == 2

    # A row is inserted before an old one: only the new row is added.
    random_image(2).save(tmp_path / "b" / "2.png")
    rows = [{"file_name": "2.png", "text": "面"}, {"file_name": "1.png", "text": "汤"}]
    total, _ = build(write_table(tmp_path / "b", "csv", rows), tmp_path / "store")
    assert total == 3


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "1.png")
    path = write_table(tmp_path, "csv", [{"file_name": "1.png", "text": "空"}])
    build(path, tmp_path / "store")
    assert (PokemonLmdb(tmp_path / "store")[0][0] == 255).all()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no images at {DATA}")
def test_a_real_table_is_stored_completely(tmp_path):
    table = DATA / "creatures" / "metadata.csv"
    count, skipped = build(table, tmp_path / "store", size=64, caption_column="zh_text")
    assert count > 100
    assert not skipped
    assert "老鼠" in read_captions(tmp_path / "store")
