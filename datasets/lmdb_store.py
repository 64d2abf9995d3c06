"""Pictures and captions in one LMDB file: written once, read at random from any worker.

A record is three things behind each other: the length of a header (4 bytes, little-endian), the header, JSON in UTF-8 such as
{"caption": "番茄炒鸡蛋"}, and the picture as an encoded image file (PNG, JPEG ...). Nothing is ever unpickled, so a store from
a stranger can do no harm. Record i has the key "000000042"; beside the records stands the key "about": {"layout":
"easy-diffusion image-caption", "version": 1, "count": N}.

LMDB maps the file into memory: a reader touches only the pages that it wants, and a transaction is there as a whole or not at
all, whenever the process dies. The file needs lmdb, Pillow, numpy and torch.

>>> import tempfile
>>> folder = tempfile.mkdtemp()
>>> records = [(torch.zeros(3, 8, 8, dtype=torch.uint8), "番茄汤"), (torch.ones(3, 8, 8, dtype=torch.uint8), "土豆汤")]
>>> *_, count = append(folder, records)
>>> picture, caption = ImageCaptionStore(folder)[1]
>>> count, tuple(picture.shape), caption
(2, (3, 8, 8), '土豆汤')
"""

import io
import itertools
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image

LAYOUT, VERSION = "easy-diffusion image-caption", 1
ABOUT = b"about"
_environments = {}


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
        self.length = count(folder)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"record {index} of {self.length} in {self.folder}")
        with _reading(self.folder).begin(buffers=True) as transaction:
            record = transaction.get(_key(index))
            if record is None:
                raise KeyError(f"record {index} is missing in {self.folder}, which should hold {self.length}")
            try:
                picture, header = unpack(record)
                return picture, header["caption"]
            except (OSError, ValueError, KeyError, struct.error) as error:
                raise ValueError(f"record {index} in {self.folder} is damaged: {error}") from error


def count(folder) -> int:
    """How many records a folder's store holds; 0 where there is none. Raises ValueError for an LMDB that is not a store."""
    file = Path(folder) / "data.mdb"
    if not file.is_file() or file.stat().st_size == 0:                      # empty: a writer was killed as it began
        return 0
    with _reading(folder).begin() as transaction:
        about, empty = transaction.get(ABOUT), transaction.stat()["entries"] == 0
    if empty:
        return 0
    try:
        about = json.loads(about)
        layout, version = about["layout"], about["version"]
    except (TypeError, ValueError, KeyError):
        layout = version = None
    if layout != LAYOUT:
        raise ValueError(f"{folder} holds an LMDB, but not one that ImageCaptionStore can read: it has no record named «about»")
    if version != VERSION:
        raise ValueError(f"{folder} has layout version {version}; this code reads version {VERSION}")
    return about["count"]


def append(folder, records: Iterable, per_transaction: int = 256) -> Iterator[int]:
    """Write (picture, caption) records behind those that are there; yields the number of records after each, once they are committed.

    A picture is uint8 [3, H, W] (stored as PNG, without loss) or the bytes of an image file (stored as they are). Killed at
    any moment, the store holds whole transactions: `count` tells from which record to go on. It grows as it must.
    """
    present = count(folder)
    _close(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(folder), map_size=2 ** 26)
    try:
        records = iter(records)
        while chunk := list(itertools.islice(records, per_transaction)):
            packed = [pack(picture, caption) for picture, caption in chunk]
            about = json.dumps({"layout": LAYOUT, "version": VERSION, "count": present + len(packed)}).encode()
            while True:
                try:
                    with environment.begin(write=True) as transaction:
                        for i, record in enumerate(packed):
                            transaction.put(_key(present + i), record)
                        transaction.put(ABOUT, about)
                    break
                except lmdb.MapFullError:
                    environment.set_mapsize(2 * environment.info()["map_size"])
            for _ in packed:
                present += 1
                yield present
    finally:
        environment.close()


def pack(picture, caption: str) -> bytes:
    """One record: header length, header, encoded picture."""
    if not isinstance(picture, (bytes, bytearray)):
        picture = torch.as_tensor(picture)
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"a picture is uint8 [3, H, W], not {picture.dtype} {list(picture.shape)}")
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
        picture = buffer.getvalue()
    if not isinstance(caption, str):
        raise TypeError(f"a caption is a str, not {caption!r}")
    header = json.dumps({"caption": caption}, ensure_ascii=False).encode()
    return struct.pack("<I", len(header)) + header + picture


def unpack(record) -> tuple[torch.Tensor, dict]:
    """(picture uint8 [3, H, W], header) of one record, bytes or a buffer."""
    size, = struct.unpack_from("<I", record)
    header = json.loads(bytes(record[4:4 + size]))
    with Image.open(io.BytesIO(record[4 + size:])) as image:
        picture = np.array(image.convert("RGB"))
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous(), header


def _key(index):
    return b"%09d" % index


def _reading(folder):
    """The environment for reading a folder, one a process: LMDB must not be opened twice in the same one."""
    folder = os.path.realpath(folder)
    name = os.getpid(), folder, os.stat(os.path.join(folder, "data.mdb")).st_ino
    if name not in _environments:
        try:
            _environments[name] = lmdb.open(folder, readonly=True, lock=os.access(folder, os.W_OK), readahead=False)
        except lmdb.Error as error:
            raise ValueError(f"{folder} cannot be opened as LMDB: {error}") from error
    return _environments[name]


def _close(folder):
    for name in [name for name in _environments if name[:2] == (os.getpid(), os.path.realpath(folder))]:
        _environments.pop(name).close()
