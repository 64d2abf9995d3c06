"""A table of pictures and captions in a store: python -m datasets.pokemon_lmdb TABLE STORE --size 128 --caption zh_text

TABLE is a .csv or .jsonl file with a column of file names, relative to it, or a .parquet file with the pictures inside, the form in which
the Pokémon caption sets are published (`image, text`, or `image, en_text, zh_text`). Rows that lack a picture or a caption are skipped and
counted. The file needs lmdb, Pillow, numpy, torch, tqdm and, for parquet, pyarrow; beside it, aipos.py, aipos_lmdb.py and lmdb_store.py.

>>> import tempfile, pathlib
>>> from PIL import Image
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> Image.new("RGBA", (40, 40), (255, 200, 0, 128)).save(folder / "25.png")
>>> _ = (folder / "table.csv").write_text("file_name,zh_text\\n25.png,黄色的电老鼠\\n26.png,\\n", encoding="utf-8")
>>> build(folder / "table.csv", folder / "store", size=32, caption="zh_text", show_progress=False)
(1, {'table.csv, row 2: 26.png': 'no caption in column zh_text'})
>>> PokemonLmdb(folder / "store")[0][1]
'黄色的电老鼠'
"""

import argparse
import csv
import io
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from .aipos import load_photo
from .aipos_lmdb import AiposFoodLmdb
from .lmdb_store import store_files

PokemonLmdb = AiposFoodLmdb                                                 # a store does not depend on its source


def read_table(table) -> tuple[list[str], int, Iterable[dict | str]]:
    """The columns of a .csv, .jsonl or .parquet file, how many rows it has, and the rows, one after the other; instead of a row that cannot
    be read, a str that says why. Raises FileNotFoundError, or ValueError for a file that is none of these."""
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}")
    if table.suffix == ".parquet":
        import pyarrow.parquet
        try:
            file = pyarrow.parquet.ParquetFile(table)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{table} is damaged, or no parquet file: {error}") from error
        return file.schema_arrow.names, file.metadata.num_rows, (row for part in file.iter_batches(64) for row in part.to_pylist())
    text = table.read_text("utf-8-sig", "replace")                          # what is not UTF-8 becomes �
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{table}, line {reader.line_num}: {error}") from error
        return reader.fieldnames or [], len(rows), rows
    elif table.suffix == ".jsonl":
        rows = [parse_json_row(line) for line in text.split("\n") if line.strip()]
    else:
        raise ValueError(f"a table is .csv, .jsonl or .parquet, not {table.name}")
    return list(dict.fromkeys(column for row in rows if isinstance(row, dict) for column in row)), len(rows), rows


def parse_json_row(line: str) -> dict | str:
    """One line of a .jsonl file, or why it is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"no JSON: {error}"
    return row if isinstance(row, dict) else "no JSON object"


def build_store(table, store, size: int = 128, caption: str = "text", image: str | None = None, show_progress: bool = True) -> tuple[int, dict[str, str]]:
    """Write a table into a store. caption, image: the columns (image: file_name or image, whichever there is). Returns how many pictures
    the store holds and, for each row that was skipped, why. Raises ValueError for a column that is not there, with those that are."""
    columns, total, rows = read_table(table)
    image = image or next((name for name in ("file_name", "image") if name in columns), "file_name")
    for column in (caption, image):
        if column not in columns:
            raise ValueError(f"{table} has no column {column}; it has {', '.join(map(str, columns)) or 'none'}")

    place = Path(table).resolve()

    def entries():
        for number, row in enumerate(rows, 1):
            name = f"{place.name}, row {number}"
            if isinstance(row, str):
                yield name, "", row
                continue
            content, words = row.get(image), row.get(caption)
            if isinstance(content, str):
                name += f": {content}"
            if isinstance(content, dict):                                   # parquet: {"bytes": ..., "path": ...}
                content = content.get("bytes")
            if not isinstance(content, (str, bytes)) or not content:
                yield name, "", "no picture"
            elif not isinstance(words, str) or not words.strip():
                yield name, "", f"no caption in column {caption}"
            elif "\ufffd" in words:
                yield name, "", f"the caption in column {caption} is not UTF-8: {words}"
            elif "\n" in words.strip():
                yield name, "", "the caption runs over several lines: a quote that was not closed?"
            else:
                yield name, words.strip(), content if isinstance(content, bytes) else place.parent / content

    return store_files(store, entries(), partial(load_photo, size=size), {"size": size, "caption": caption, "image": image}, show_progress, total)


def main(arguments=None):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m datasets.pokemon_lmdb", description=__doc__.splitlines()[0])
    parser.add_argument("table", help="a .csv, .jsonl or .parquet file")
    parser.add_argument("store", help="where the store goes; if it is there, it is continued")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default: %(default)s)")
    parser.add_argument("--caption", default="text", help="the column of captions (default: %(default)s)")
    parser.add_argument("--image", help="the column of pictures (default: file_name or image, whichever there is)")
    options = parser.parse_args(arguments)
    try:
        count, skipped = build_store(options.table, options.store, options.size, options.caption, options.image)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{count} pictures in {options.store}, {len(skipped)} rows skipped")


if __name__ == "__main__":
    main()
