"""Write a table into an LMDB store: python -m datasets.table_lmdb TABLE STORE --caption zh_text

TABLE has a row per image, with a column of captions and a column of images. It is one of

    .csv, .jsonl    the column of images has the names of image files, relative to the table
    .parquet        the column of images has the content of the image files

A table that Chinese Excel has written may be in GBK, GB 18030 or UTF-16. A row without an image or
a caption is skipped, and the reason is reported. lmdb_store.py describes the store. If the command
is interrupted, run it again: it resumes where it stopped.

The file needs lmdb, Pillow, numpy, torch, tqdm and, for .parquet, pyarrow; beside it, aipos.py,
aipos_lmdb.py, lmdb_environment.py and lmdb_store.py.

>>> import tempfile
>>> from PIL import Image
>>> from .lmdb_store import ImageCaptionStore
>>> folder = Path(tempfile.mkdtemp())
>>> Image.new("RGBA", (40, 40), (255, 200, 0, 128)).save(folder / "25.png")
>>> table = folder / "table.csv"
>>> lines = ["file_name,zh_text", "25.png,黄色的电老鼠", "26.png,"]  # the last caption is empty
>>> _ = table.write_text("\\n".join(lines), encoding="utf-8")
>>> count, skipped = build_store(table, folder / "store", 32, "zh_text", show_progress=False)
>>> count, skipped
(1, {'table.csv, row 2: 26.png': 'no caption in column zh_text'})
>>> ImageCaptionStore(folder / "store")[0][1]
'黄色的电老鼠'
"""

import argparse
import codecs
import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from unicodedata import normalize

from .aipos import load_photo
from .aipos_lmdb import MAX_SIZE
from .lmdb_store import store_files


def read_table(table) -> tuple[list[str], int, Iterable[dict | str]]:
    """Read a table: (column names, number of rows, rows).

    table: path of a .csv, .jsonl or .parquet file

    A row is a dict from column names to values. For a row that cannot be read, a str is returned
    in its place, which is the reason.
    Raises FileNotFoundError if there is no such file, ValueError if it cannot be read or has
    another suffix.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}")
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(table)
    if suffix == ".csv":
        return _read_csv(table)
    if suffix == ".jsonl":
        return _read_jsonl(table)
    raise ValueError(f"a table is .csv, .jsonl or .parquet, not {table.name}")


def _read_parquet(table: Path):
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(table)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{table} is damaged or is not a parquet file: {error}") from error
    rows = (row for batch in file.iter_batches(64) for row in batch.to_pylist())
    return file.schema_arrow.names, file.metadata.num_rows, rows


def _read_csv(table: Path):
    text = _read_text(table)
    first_line = text.split("\n", 1)[0]
    delimiter = max(",\t;", key=first_line.count)  # Excel writes all three
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{table}, line {reader.line_num}: {error}") from error
    return reader.fieldnames, len(rows), rows


def _read_jsonl(table: Path):
    lines = _read_text(table).split("\n")
    rows = [parse_json_row(line) for line in lines if line.strip()]
    columns = {}  # a dict keeps the order in which the columns appear first
    for row in rows:
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
    return list(columns), len(rows), rows


def _read_text(table: Path) -> str:
    """Decode a table: UTF-8, or what Chinese Excel writes, UTF-16 or GB 18030 (with GBK in it).

    In a table that is UTF-8 but for some bytes, those become "\ufffd".
    """
    content = table.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    if b"\0" in content:  # UTF-16 without its mark; the high byte of a line's end is zero
        little_endian = content.count(b"\n\0") >= content.count(b"\0\n")
        return content.decode("utf-16-le" if little_endian else "utf-16-be", "replace")
    text = content.decode("utf-8-sig", "replace")
    non_ascii = sum(character > "\x7f" for character in text)
    # Of a Chinese text in GB 18030, hardly any character is valid UTF-8.
    if 2 * text.count("\ufffd") > non_ascii:
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode("gb18030")
    return text


def parse_json_row(line: str) -> dict | str:
    """Parse one line of a .jsonl file: a dict, or for an invalid line the reason as a str."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"invalid JSON: {error}"
    if not isinstance(row, dict):
        return "not a JSON object"
    return row


def build_store(
    table,
    store,
    size: int = 128,
    caption_column: str = "text",
    image_column: str | None = None,
    show_progress: bool = True,
) -> tuple[int, dict[str, str]]:
    """Write the images and captions of a table into a store.

    If the store exists, only the rows that it lacks are appended, so that a call resumes an
    interrupted one.

    table: path of a .csv, .jsonl or .parquet file
    store: folder of the store
    size: side of the stored images in pixels
    caption_column: name of the column of captions
    image_column: name of the column of images; by default "file_name" or, if only that exists,
        "image"

    Returns the number of records in the store and a dict from each skipped row to the reason.
    Raises ValueError, with the names of the existing columns, if a column does not exist.
    """
    columns, total, rows = read_table(table)
    if not image_column:
        image_column = "file_name"
        if "file_name" not in columns and "image" in columns:
            image_column = "image"
    for column in (caption_column, image_column):
        if column not in columns:
            existing = ", ".join(map(str, columns)) or "none"
            raise ValueError(f"{table} has no column {column}; it has {existing}")
    samples = _list_samples(Path(table).resolve(), rows, caption_column, image_column)
    settings = {"size": size, "caption": caption_column, "image": image_column}
    load_image = partial(load_photo, size=size)
    return store_files(store, samples, load_image, settings, show_progress, total)


def _list_samples(table: Path, rows, caption_column: str, image_column: str) -> Iterator[tuple]:
    """Yield (name, caption, source) for each row of a table, as `store_files` expects them.

    For a row that cannot be used, the caption is empty and the source is the reason, a str.
    """
    for number, row in enumerate(rows, 1):
        name = f"{table.name}, row {number}"
        if isinstance(row, str):  # `read_table` could not read the row
            reason = row
            yield name, "", reason
            continue
        image = row.get(image_column)
        if isinstance(image, dict):  # parquet: {"bytes": content of the file, "path": its name}
            image = image.get("bytes")
        elif isinstance(image, str):
            name += f": {image}"

        captions = row.get(caption_column)
        if not isinstance(captions, list):
            captions = [captions]
        for caption in captions or [None]:  # an image may have several: a record for each
            if isinstance(caption, str) and table.suffix.lower() != ".csv":
                caption = " ".join(caption.split())  # a caption of several lines
            reason = _why_unusable(image, caption, caption_column)
            if reason is not None:
                yield name, "", reason
            elif isinstance(image, str):
                yield name, caption.strip(), find_image(table.parent, image)
            else:
                yield name, caption.strip(), image


def find_image(folder: Path, name: str) -> Path:
    """The path of an image file that a table names.

    A table of Windows has backslashes in it, and its letters may be of another case than those of
    the file; a file from macOS may have its accents apart (NFD).
    """
    path = folder / name.strip()
    if path.exists():
        return path
    path = folder
    for part in name.strip().replace("\\", "/").split("/"):
        if not (path / part).exists() and path.is_dir():
            names = list_names(path, path.stat().st_mtime_ns)
            part = names.get(comparable(part), part)
        path = path / part
    return path


@lru_cache(maxsize=16)
def list_names(folder: Path, changed: int) -> dict[str, str]:
    """The names in a folder by their `comparable` form; changed: when the folder was changed."""
    return {comparable(path.name): path.name for path in sorted(folder.iterdir(), reverse=True)}


def comparable(name: str) -> str:
    """A form that is equal for names which Windows or macOS takes for the same."""
    return normalize("NFC", name).casefold()


def _why_unusable(image, caption, caption_column: str) -> str | None:
    """Return the reason to skip a row; None if it has an image and a caption."""
    if not isinstance(image, (str, bytes)) or not image:
        return "no image"
    if not isinstance(caption, str) or not caption.strip():
        return f"no caption in column {caption_column}"
    if "\ufffd" in caption:
        return f"the caption in column {caption_column} is not UTF-8: {caption}"
    if "\n" in caption.strip():  # only in .csv
        return "the caption has several lines: is a closing quote missing?"
    return None


def main(arguments=None):
    """Run the command; see the module's docstring. Returns 1 if the store has no record."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.table_lmdb", description=__doc__.splitlines()[0]
    )
    parser.add_argument("table", help="a .csv, .jsonl or .parquet file")
    parser.add_argument("store", help="folder of the store; new images are appended to it")
    parser.add_argument(
        "--size", type=int, default=128, help="side of the images in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--caption", default="text", help="name of the column of captions (default: %(default)s)"
    )
    parser.add_argument(
        "--image",
        help="name of the column of images (default: file_name or image, whichever exists)",
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.size <= MAX_SIZE:
        parser.error(f"--size must be from 1 to {MAX_SIZE}, not {options.size}")
    for stream in (sys.stdout, sys.stderr):  # a console may lack Chinese characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        count, skipped = build_store(
            options.table, options.store, options.size, options.caption, options.image
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{count} images in {options.store}, {len(skipped)} rows skipped")
    return 0 if count else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes where it stopped")
