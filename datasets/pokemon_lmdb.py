"""A table of pictures and captions in a store: python -m datasets.pokemon_lmdb TABLE STORE --size 128 --caption zh_text

TABLE is a .csv or .jsonl file with a column of file names, relative to it, or a .parquet file with the pictures inside, the form in which
the Pokémon caption sets are published (`image, text`, or `image, en_text, zh_text`). Rows that lack a picture or a caption are skipped and
counted. The file needs lmdb, Pillow, numpy, torch, tqdm and, for parquet, pyarrow; beside it, aipos.py, aipos_lmdb.py and lmdb_store.py.

>>> import tempfile, pathlib
>>> from PIL import Image
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> Image.new("RGBA", (40, 40), (255, 200, 0, 128)).save(folder / "25.png")
>>> _ = (folder / "table.csv").write_text("file_name,zh_text\\n25.png,黄色的电老鼠\\n26.png,\\n", encoding="utf-8")
>>> build(folder / "table.csv", folder / "store", size=32, caption="zh_text", bar=False)
(1, {'table.csv, row 2: 26.png': 'no caption in column zh_text'})
>>> PokemonLmdb(folder / "store")[0][1]
'黄色的电老鼠'
"""

import argparse
import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np

from .aipos import photograph
from .aipos_lmdb import AiposFoodLmdb
from .lmdb_store import store_files

PokemonLmdb = AiposFoodLmdb                                                 # what is in a store no longer tells where it came from


def table_rows(table) -> list[dict]:
    """The rows of a .csv, .jsonl or .parquet file. Raises ValueError for another, or one that cannot be read, with the line."""
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}")
    if table.suffix == ".parquet":
        import pyarrow.parquet
        return pyarrow.parquet.read_table(table).to_pylist()
    try:
        text = table.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: {error}") from error
    if table.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if table.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{table}, line {number}, is no JSON: {error}") from error
        return rows
    raise ValueError(f"a table is .csv, .jsonl or .parquet, not {table.name}")


def picture_of(source, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a file, or of an image file's bytes."""
    return photograph(io.BytesIO(source) if isinstance(source, bytes) else source, size)


def build(table, store, size: int = 128, caption: str = "text", image: str | None = None, bar: bool = True) -> tuple[int, dict[str, str]]:
    """Write a table into a store. caption, image: the columns (image: file_name or image, whichever there is). Returns how many pictures
    the store holds and, for each row that was skipped, why. Raises ValueError for a column that is not there, with those that are."""
    rows, todo = table_rows(table), []
    columns = list(dict.fromkeys(column for row in rows for column in row))
    image = image or next((name for name in ("file_name", "image") if name in columns), "file_name")
    for column in (caption, image):
        if column not in columns:
            raise ValueError(f"{table} has no column {column}; it has {', '.join(map(str, columns)) or 'none'}")
    for number, row in enumerate(rows, 1):
        content, words = row.get(image), row.get(caption)
        name = f"{Path(table).name}, row {number}" + (f": {content}" if isinstance(content, str) else "")
        if isinstance(content, dict):                                       # parquet: {"bytes": ..., "path": ...}
            content = content.get("bytes")
        elif isinstance(content, str):
            content = Path(table).parent / content
        problem = "no picture" if not content else None if isinstance(words, str) and words.strip() else f"no caption in column {caption}"
        todo.append((name, (words or "").strip() if isinstance(words, str) else "", problem or partial(picture_of, content, size)))
    return store_files(store, todo, {"size": size, "caption": caption, "image": image}, bar)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m datasets.pokemon_lmdb", description=__doc__.splitlines()[0])
    parser.add_argument("table", help="a .csv, .jsonl or .parquet file")
    parser.add_argument("store", help="where the store goes; if it is there, it is continued")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default: %(default)s)")
    parser.add_argument("--caption", default="text", help="the column of captions (default: %(default)s)")
    parser.add_argument("--image", help="the column of pictures (default: file_name or image, whichever there is)")
    options = parser.parse_args(arguments)
    try:
        count, skipped = build(options.table, options.store, options.size, options.caption, options.image)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{count} pictures in {options.store}, {len(skipped)} rows skipped")


if __name__ == "__main__":
    main()
