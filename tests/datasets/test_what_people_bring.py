"""Files as people have them: Chinese Excel, Windows paths, deep folders, 16 bits, cut stores."""

import json
import os

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from datasets import aipos_lmdb, table_lmdb
from datasets.aipos import list_photos, load_photo, to_eight_bits
from datasets.lmdb_environment import commit, open_writer
from datasets.lmdb_store import ImageCaptionStore, append_records, read_captions

from .example_files import random_image


def build(table, store, **options):
    return table_lmdb.build_store(table, store, size=8, show_progress=False, **options)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tables_of_chinese_excel(tmp_path, encoding, delimiter):
    random_image(0).save(tmp_path / "菜.png")
    second = "" if delimiter == "," else "家常菜,很香"
    lines = [("图片", "描述"), ("菜.png", "番茄炒鸡蛋"), ("菜.png", second)]
    text = "\r\n".join(delimiter.join(line) for line in lines)
    (tmp_path / "table.csv").write_bytes(text.encode(encoding))
    count, _ = build(
        tmp_path / "table.csv", tmp_path / "store", caption_column="描述", image_column="图片"
    )
    captions = list(read_captions(tmp_path / "store"))
    assert captions == ["番茄炒鸡蛋", "家常菜,很香"][:count]
    assert count == (1 if delimiter == "," else 2)


def test_a_path_with_backslashes(tmp_path):
    (tmp_path / "img").mkdir()
    random_image(0).save(tmp_path / "img" / "26.png")
    (tmp_path / "table.csv").write_text("file_name,text\nimg\\26.png,鼠\n", "utf-8")
    assert build(tmp_path / "table.csv", tmp_path / "store") == (1, {})


@pytest.mark.parametrize(
    "name", ["IMG/café.PNG", "img\\Cafe\u0301.png", " img/café.png ", "./img/café.png"]
)
def test_a_path_of_another_system_is_found(tmp_path, name):
    (tmp_path / "img").mkdir()
    random_image(0).save(tmp_path / "img" / "café.png")
    (tmp_path / "TABLE.CSV").write_text(f"file_name , text\n{name},鼠\n", "utf-8")
    assert build(tmp_path / "TABLE.CSV", tmp_path / "store") == (1, {})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_utf_16_without_its_mark(tmp_path, encoding, line_end):
    random_image(0).save(tmp_path / "1.png")
    lines = ["file_name,text", "1.png,番茄炒鸡蛋", ""]
    (tmp_path / "table.csv").write_bytes(line_end.join(lines).encode(encoding))
    assert build(tmp_path / "table.csv", tmp_path / "store") == (1, {})
    assert list(read_captions(tmp_path / "store")) == ["番茄炒鸡蛋"]


def test_several_captions_of_an_image_are_several_records(tmp_path):
    random_image(0).save(tmp_path / "1.png")
    rows = [
        {"file_name": "1.png", "text": ["番茄汤", "一碗汤", " "]},
        {"file_name": "1.png", "text": []},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "table.jsonl").write_text(text, "utf-8")
    count, skipped = build(tmp_path / "table.jsonl", tmp_path / "store")
    assert count == 2
    assert list(read_captions(tmp_path / "store")) == ["番茄汤", "一碗汤"]
    assert set(skipped.values()) == {"no caption in column text"}


def test_a_caption_of_several_lines_is_joined_by_spaces(tmp_path):
    random_image(0).save(tmp_path / "1.png")
    row = {"file_name": "1.png", "text": "番茄\r\n  鸡蛋\n"}
    (tmp_path / "table.jsonl").write_text(json.dumps(row), "utf-8")
    assert build(tmp_path / "table.jsonl", tmp_path / "store") == (1, {})
    assert list(read_captions(tmp_path / "store")) == ["番茄 鸡蛋"]


# ---------------------------------------------------------------- folders and commands


def test_hidden_folders_are_left_out_and_misplaced_images_are_counted(tmp_path):
    for name in (
        "番茄汤/1.png", "番茄汤/.1.png", ".ipynb_checkpoints/2.png", "__MACOSX/3.png",
        "@eaDir/3.png", "$RECYCLE.BIN/3.png", "番茄汤/more/4.png", "番茄汤/more/.4.png",
        "土豆汤/a/b/5.png", "6.png", ".6.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(0).save(path)
    with pytest.warns(UserWarning, match="3 images, such as 6.png, are skipped: an image must"):
        assert list_photos(tmp_path) == [(tmp_path / "番茄汤" / "1.png", "番茄汤")]


@pytest.mark.parametrize("module", [aipos_lmdb, table_lmdb])
@pytest.mark.parametrize("size", ["0", "-5", "100000000"])
def test_a_size_out_of_range_is_refused(module, size, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        module.main([str(tmp_path), str(tmp_path / "store"), "--size", size])
    assert error.value.code == 2
    assert f"--size must be from 1 to 4096, not {size}" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_command_that_took_nothing_ends_with_status_1(tmp_path, capsys):
    (tmp_path / "photos" / "汤").mkdir(parents=True)
    (tmp_path / "photos" / "汤" / "1.jpg").write_bytes(b"not an image")
    (tmp_path / "table.csv").write_text("file_name,text\nnowhere.png,汤\n", "utf-8")
    for module, source in ((aipos_lmdb, "photos"), (table_lmdb, "table.csv")):
        assert module.main([str(tmp_path / source), str(tmp_path / "store")]) == 1
        output = capsys.readouterr().out
        assert "0 images" in output and "BytesIO" not in output


# ---------------------------------------------------------------- depths


@pytest.mark.parametrize(
    "value, dtype, suffix, expected",
    [
        (20_000, np.uint16, "pgm", 78), (20_000, np.uint16, "png", 78),
        (20_000, np.int32, "tiff", 78), (0.5, np.float32, "tiff", 128),
        (100.0, np.float32, "tiff", 100), (300, np.uint16, "png", 1), (200, np.uint8, "png", 200),
    ],
)
def test_every_depth_is_scaled_by_its_own_range(tmp_path, value, dtype, suffix, expected):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.full((8, 8), value, dtype)).save(path)
    assert load_photo(path, 8).tolist() == np.full((8, 8, 3), expected).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    values = np.array([[0.5, value]], np.float32)
    with pytest.raises(ValueError, match="not finite"):
        to_eight_bits(Image.fromarray(values))


def test_a_link_to_nowhere_is_skipped_with_its_reason(tmp_path):
    (tmp_path / "food" / "汤").mkdir(parents=True)
    random_image(0).save(tmp_path / "food" / "汤" / "1.png")
    (tmp_path / "food" / "汤" / "2.png").symlink_to(tmp_path / "nowhere")
    total, skipped = aipos_lmdb.build_store(
        tmp_path / "food", tmp_path / "store", 8, show_progress=False
    )
    assert total == 1
    assert "No such file" in "".join(skipped.values())


# ---------------------------------------------------------------- stores


def write_store(folder, count=300):
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    for _ in append_records(folder, [(image, "番茄汤") for image in images]):
        pass


def test_a_store_that_was_cut_is_named_before_its_pages_are_read(tmp_path):
    """Reading a page that is not in the file ends a process with SIGBUS."""
    write_store(tmp_path / "whole")
    content = (tmp_path / "whole" / "data.mdb").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "data.mdb").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cut is damaged: data.mdb has {len(content) // 2} bytes"):
        ImageCaptionStore(tmp_path / "cut")


@pytest.mark.parametrize("content", [None, b""])
def test_an_empty_store_is_named(tmp_path, content):
    if content is None:
        with open_writer(tmp_path):
            pass
    else:
        (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(ValueError, match="is empty"):
        ImageCaptionStore(tmp_path)


def test_opening_for_writing_does_not_make_the_map_longer_than_the_file(tmp_path, monkeypatch):
    """Windows makes the file as long as the map. Each time, it is set to that length here."""
    write_store(tmp_path)
    path = tmp_path / "data.mdb"
    sizes = []
    for _ in range(10):
        with open_writer(tmp_path) as environment:
            sizes.append(environment.info()["map_size"])
        os.truncate(path, sizes[-1])
    assert sizes == [2**26] * 10


def test_arrays_with_negative_strides_are_stored_and_others_refused_with_a_sentence(tmp_path):
    image = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    for _ in append_records(tmp_path, [(image[::-1, :, ::-1], "汤")]):
        pass
    assert ImageCaptionStore(tmp_path)[0][0].tolist() == image[::-1, :, ::-1].tolist()
    for other in (image / 255, image[0], image[..., None]):
        with pytest.raises(ValueError, match=r"an image is uint8 \[3, H, W\], a film .* not"):
            list(append_records(tmp_path, [(other, "汤")]))


def test_a_full_map_grows_at_the_next_commit(tmp_path, monkeypatch):
    write_store(tmp_path, 10)
    with open_writer(tmp_path) as environment:
        environment.set_mapsize(environment.info()["last_pgno"] * 4096 + 8192)
        commit(environment, [(b"x%06d" % i, bytes(4000)) for i in range(100)])
    assert len(ImageCaptionStore(tmp_path)) == 10


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_store_of_a_colleague_is_read_without_a_lock(tmp_path, monkeypatch):
    """A folder that everybody may write to, with files that only their owner may write to."""
    write_store(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".mdb"))
    options = {}
    real_open = lmdb.open

    def record(*arguments, **given):
        options.update(given)
        return real_open(*arguments, **given)

    monkeypatch.setattr(lmdb, "open", record)
    assert len(ImageCaptionStore(tmp_path)) == 300
    assert options["lock"] is False
