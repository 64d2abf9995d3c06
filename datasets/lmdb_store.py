"""Pictures and captions in one LMDB file: written once, read at random from any worker.

A record is three things, one after another: the length of a header (4 bytes, little-endian), the header, JSON in UTF-8 such as
{"caption": "番茄炒鸡蛋"} and whatever columns one adds, and the picture: the bytes of an image file (PNG, JPEG ...), or, if the header has
a "shape", [3, H, W], so many numbers of a byte each. These take a little more room than a PNG and no time to decode. Nothing is ever
unpickled, so a store from a stranger runs nothing here. Record 42 has the key "000000042"; beside the records stands the key "about":
{"layout": "easy-diffusion image-caption", "version": 2, "count": N}.

LMDB maps the file into memory: a reader touches only the pages that it wants, and a transaction is there as a whole or not at
all, whenever the process dies. The file needs lmdb, Pillow, numpy, torch and tqdm.

>>> import tempfile
>>> folder = tempfile.mkdtemp()
>>> records = [(torch.zeros(3, 8, 8, dtype=torch.uint8), "番茄汤"), (torch.ones(3, 8, 8, dtype=torch.uint8), "土豆汤")]
>>> *_, count = append(folder, records)
>>> picture, caption = ImageCaptionStore(folder)[1]
>>> count, tuple(picture.shape), caption
(2, (3, 8, 8), '土豆汤')
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

# What Pillow and its like raise for a file that is no picture.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, struct.error, EOFError, Image.DecompressionBombError)
LAYOUT, VERSION = "easy-diffusion image-caption", 2                         # version 1 had image files alone
METADATA_KEY = b"about"
_environments, _writers = {}, set()


class ImageCaptionStore(torch.utils.data.Dataset):
    """The records of a folder; item i is (picture uint8 [3, H, W], caption).

    The file is opened at the first access in each process, so that the store can go to any worker, forked or spawned.
    Raises FileNotFoundError where there is no store, ValueError for an LMDB of another layout or version, and, at the
    access, KeyError or ValueError for a record that is missing or damaged, with its number.
    """

    def __init__(self, folder):
        self.folder = str(folder)
        if not (Path(folder) / "data.mdb").is_file():
            raise FileNotFoundError(f"no store in {folder}: `append` writes one")
        self.length = count_records(folder)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        picture, header = read_record(self.folder, index, self.length, decode_record)
        return picture, header["caption"]


def read_record(folder, index: int, length: int, decode_record: Callable):
    """What `unpack` makes of record `index` of `length`, a buffer that is valid until it returns. Raises IndexError, KeyError where it is
    missing, ValueError where it is damaged."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length} in {folder}")
    with open_reader(folder) as transaction:
        record = transaction.get(record_key(index))
        if record is None:
            raise KeyError(f"record {index} is missing in {folder}, which should hold {length}")
        try:
            return decode_record(record)
        except (*UNREADABLE, KeyError) as error:
            raise ValueError(f"record {index} in {folder} is damaged: {error}") from error


def count_records(folder) -> int:
    """How many records a folder's store holds; 0 where there is none. Raises ValueError for an LMDB that is not a store."""
    return _parse_count(read_metadata(folder), folder)


def read_metadata(folder) -> bytes | None:
    """What a store says of itself; None where there is nothing yet, b"" for an LMDB that does not say."""
    file = Path(folder) / "data.mdb"
    if not file.is_file() or file.stat().st_size == 0:                      # empty: a writer was killed as it began
        return None
    with open_reader(folder) as transaction:
        about = transaction.get(METADATA_KEY)
        return bytes(about) if about is not None else b"" if transaction.stat()["entries"] else None


def _parse_count(about, folder):
    if about is None:
        return 0
    try:
        about = json.loads(about)
        layout, version = about["layout"], about["version"]
    except (TypeError, ValueError, KeyError):
        layout = version = None
    if layout != LAYOUT:
        raise ValueError(f"{folder} holds an LMDB, but not one that ImageCaptionStore can read: its record «about» is missing, or of "
                         "another layout")
    if version not in (1, VERSION):
        raise ValueError(f"{folder} has layout version {version}; this code reads versions 1 and {VERSION}")
    return about["count"]


def append_records(folder, records: Iterable, per_transaction: int = 256) -> Iterator[int]:
    """Write (picture, caption) records after those that are there; yields the number of records after each, once they are committed.

    A third part of a record may be a dict of further columns that JSON can hold, for its header. A picture is uint8 [3, H, W], or the
    bytes of an image file; either is stored as it is. Killed at any moment, the store holds whole transactions:
    `count` tells from which record to go on. It grows as it must.
    """
    with open_writer(folder) as environment:
        about, records = read_metadata(folder), iter(records)                    # once: another process may be writing, too
        present = _parse_count(about, folder)
        while packed := [encode_record(*record) for record in itertools.islice(records, per_transaction)]:
            before = about
            about = json.dumps({"layout": LAYOUT, "version": VERSION, "count": present + len(packed)}).encode()
            commit(environment, [*((record_key(present + i), record) for i, record in enumerate(packed)), (METADATA_KEY, about)], before)
            for _ in packed:
                present += 1
                yield present


def store_files(folder, rows: Iterable, read: Callable, settings: dict, show_progress: bool = True, total: int | None = None):
    """Write pictures from files into a store, with a progress bar, or go on with one that was begun.

    rows: (name, caption, source), source a Path, an image file's bytes, or a str that says why there is none; total: how many, if they
    cannot be counted. read: a stream of an image file → uint8 [H, W, 3]. settings: what the pictures depend on; a store that was begun with
    others is refused (ValueError). A picture is known by its content and caption: whoever calls again, even with new names, adds only what
    is new. Returns the number of records and, for each name that was skipped, why.
    """
    recover(folder)
    done, skipped = {}, {}
    for header in read_headers(folder) if count_records(folder) else ():
        if header.get("settings") != settings or "content" not in header:
            raise ValueError(f"{folder} was built with other settings, {header.get('settings')}, not {settings}: give it another name, or "
                             "remove it")
        done[header["content"]] = header["file"]

    def records():
        for name, caption, source in tqdm(rows, f"into {folder}", total, disable=not show_progress, unit="picture"):
            name, problem = name.encode("utf-8", "backslashreplace").decode(), source if isinstance(source, str) else None
            try:
                if problem is None:
                    data = source if isinstance(source, bytes) else source.read_bytes()
                    content = hashlib.blake2b(caption.encode() + b"\0" + data, digest_size=16).hexdigest()
                    if content not in done:
                        yield torch.from_numpy(read(io.BytesIO(data))).permute(2, 0, 1), caption, {
                            "file": name, "content": content, "settings": settings}
                        done[content] = name
                    elif done[content] != name:
                        problem = f"the same picture and caption as {done[content]}"
            except UNREADABLE as error:                                     # of a caption that is not UTF-8, too
                problem = str(error) or type(error).__name__
            if problem is not None:
                skipped[name] = problem

    for _ in append_records(folder, records()):
        pass
    return count_records(folder), skipped


def read_headers(folder) -> Iterator[dict]:
    """The header of each record, in order; pictures are not decoded."""
    length = count_records(folder)
    return (read_record(folder, index, length, decode_header) for index in range(length))


def read_captions(folder) -> Iterator[str]:
    """The caption of each record, in order."""
    return (header["caption"] for header in read_headers(folder))


def encode_record(picture, caption: str, columns: dict | None = None) -> bytes:
    """One record: header length, header, encoded picture."""
    shape = {}
    if not isinstance(picture, (bytes, bytearray)):
        picture = torch.as_tensor(picture)
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"a picture is uint8 [3, H, W], not {picture.dtype} {list(picture.shape)}")
        shape, picture = {"shape": list(picture.shape)}, picture.contiguous().numpy().tobytes()
    if not isinstance(caption, str):
        raise TypeError(f"a caption is a str, not {caption!r}")
    header = json.dumps({"caption": caption} | (columns or {}) | shape, ensure_ascii=False).encode()
    return struct.pack("<I", len(header)) + header + picture


def decode_header(record) -> dict:
    """The header of one record: a dict with a caption. Raises ValueError or struct.error for something else."""
    size, = struct.unpack_from("<I", record)
    header = json.loads(bytes(record[4:4 + size]))
    if not isinstance(header, dict) or not isinstance(header.get("caption"), str):
        raise ValueError("its header has no caption")
    return header


def decode_record(record) -> tuple[torch.Tensor, dict]:
    """(picture uint8 [3, H, W], header) of one record, bytes or a buffer."""
    size, = struct.unpack_from("<I", record)
    header = decode_header(record)
    if "shape" in header:
        return torch.frombuffer(bytearray(record[4 + size:]), dtype=torch.uint8).view(header["shape"]), header
    with Image.open(io.BytesIO(record[4 + size:])) as image:
        picture = np.array(image.convert("RGB"))
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous(), header


def record_key(index: int) -> bytes:
    """The key of a record."""
    return b"%09d" % index


def commit(environment, pairs, about: bytes | None = None) -> None:
    """Write all pairs of key and value in one transaction; the map grows as it must.

    about: what the store said of itself when the writer last saw it. Raises RuntimeError if it says something else now, OSError if the
    disk does not take it; what was committed before stays as it is.
    """
    while True:
        try:
            with environment.begin(write=True) as transaction:
                if pairs[-1][0] == METADATA_KEY and transaction.get(METADATA_KEY) != about:
                    raise RuntimeError(f"another process is writing to {environment.path()}, too: the last records of this one are "
                                       "not stored")
                for key, value in pairs:
                    transaction.put(key, value)
            return
        except lmdb.MapResizedError:
            environment.set_mapsize(0)
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
        except lmdb.Error as error:
            free = shutil.disk_usage(environment.path()).free / 1e6
            raise OSError(f"{environment.path()} cannot be written to: {error}; {free:.1f} MB are free there. The records before these are "
                          "stored") from error


def recover(folder) -> None:
    """For whoever goes on with a store, before asking `count` where. A writer that was killed on the last step of a commit leaves readers a
    transaction behind, as long as some process has the file open; the next commit mends that, and `writing` begins with one."""
    if read_metadata(folder) is not None:
        with open_writer(folder):
            pass


@contextlib.contextmanager
def open_reader(folder):
    """A transaction for reading a folder. LMDB must not be opened twice in a process, so there is one environment a process and file; while
    this process writes, it is the writer's. Another process may have made the store grow: then the map is taken anew."""
    file = os.stat(f"{folder}/data.mdb")
    name = os.getpid(), file.st_dev, file.st_ino
    if name not in _environments:
        try:
            _environments[name] = lmdb.open(str(folder), readonly=True, lock=os.access(folder, os.W_OK), readahead=False)
        except lmdb.Error as error:
            raise ValueError(f"{folder} cannot be opened as LMDB: {error}") from error
    environment = _environments[name]
    try:
        transaction = environment.begin(buffers=True)
    except lmdb.MapResizedError:
        environment.set_mapsize(0)
        transaction = environment.begin(buffers=True)
    with transaction:
        yield transaction


@contextlib.contextmanager
def open_writer(folder):
    """The environment for writing to a folder, this process's only one while it is open. Raises RuntimeError if there is one already."""
    path = Path(folder) / "data.mdb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    file = path.stat()
    name = os.getpid(), file.st_dev, file.st_ino
    if name in _writers:
        raise RuntimeError(f"{folder} is being written to by this process already: finish that first")
    if name in _environments:
        _environments.pop(name).close()
    try:
        _environments[name] = environment = lmdb.open(str(folder), map_size=max(2 ** 26, 2 * file.st_size))
    except lmdb.Error as error:
        raise ValueError(f"{folder} cannot be opened as LMDB: {error}") from error
    _writers.add(name)
    try:
        with environment.begin(write=True) as transaction:                  # see `settle`
            about = transaction.get(METADATA_KEY)
            if about is not None:
                transaction.put(METADATA_KEY, about)
        yield environment
    finally:
        _writers.discard(name)
        _environments.pop(name, None)
        environment.close()
