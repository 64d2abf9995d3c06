"""Images, tables and LMDB entries that several tests of the datasets need."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image


def random_image(seed: int, size=(48, 40), mode: str = "RGB") -> Image.Image:
    """An image of random pixels; size: (width, height); mode: "RGB" or "L" (grey)."""
    width, height = size
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def encode_image(image: Image.Image, image_format: str = "JPEG", **options) -> bytes:
    """The content of an image file."""
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def write_table(folder: Path, suffix: str, rows: list[dict]) -> Path:
    """Write rows to folder/table.csv or folder/table.jsonl."""
    folder.mkdir(exist_ok=True)
    path = folder / f"table.{suffix}"
    if suffix == "csv":
        lines = [",".join(rows[0])]
        lines += [",".join(str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    elif suffix == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        raise ValueError(suffix)
    return path


@contextlib.contextmanager
def write_lmdb(folder: Path):
    """A write transaction on an LMDB folder, without lmdb_store.py."""
    with lmdb.open(str(folder)) as environment:
        with environment.begin(write=True) as transaction:
            yield transaction


def read_lmdb(folder: Path) -> list[tuple[bytes, bytes]]:
    """All (key, value) pairs of an LMDB folder, without lmdb_store.py.

    They are read from a copy, because this process may have the folder itself open already.
    """
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / "data.mdb", copy)
        with lmdb.open(copy, readonly=True, lock=False) as environment:
            with environment.begin() as transaction:
                return list(transaction.cursor())
