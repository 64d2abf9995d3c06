"""Image–caption records in one LMDB file: written once, read at random by any worker process.

A *store* is a folder with an LMDB file (data.mdb). LMDB is an embedded key–value database. It maps
its file into memory, so a process reads only the pages that it accesses. Its transactions are
atomic: if a process is killed, each transaction is in the file completely or not at all.
lmdb_environment.py opens and writes the file.

Record 42 has the key "000000042". Its value consists of three parts, one after another:

    length    4 bytes, little-endian: the length of the header
    header    JSON in UTF-8, such as {"caption": "番茄炒鸡蛋"}, with any further fields
    image     if the header has a field "shape": [3, H, W], the 3·H·W uint8 pixel values, or
              [F, 3, H, W], those of the F frames of a film; else the content of an image file
              (PNG, JPEG, …)

Pixel values need a little more space than a PNG and no time to decode. Nothing is unpickled, so a
store from an untrusted source cannot execute code.

The *metadata* of a store stands beside the records, as JSON under the key "about":

    {"layout": "easy-diffusion image-caption", "version": 2, "count": N}

The layout contains the name of this project, Easy Diffusion, because other programs also use the
name data.mdb.

The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it, lmdb_environment.py.

>>> import tempfile
>>> folder = tempfile.mkdtemp()
>>> black = torch.zeros(3, 8, 8, dtype=torch.uint8)
>>> counts = list(append_records(folder, [(black, "番茄汤"), (black + 255, "土豆汤")]))
>>> image, caption = ImageCaptionStore(folder)[1]
>>> counts, tuple(image.shape), caption
([1, 2], (3, 8, 8), '土豆汤')
"""

import hashlib
import io
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .lmdb_environment import (
    METADATA_KEY,
    commit,
    open_reader,
    open_writer,
    read_metadata,
    recover,
)

# The exceptions that Pillow raises for a file that is damaged or not an image.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    struct.error,
    EOFError,
    Image.DecompressionBombError,
)
LAYOUT = "easy-diffusion image-caption"
VERSION = 2  # version 1 contained image files only, no pixel values


class ImageCaptionStore(torch.utils.data.Dataset):
    """Item i of a store is (image uint8 [3, H, W], caption); a film is uint8 [F, 3, H, W].

    The LMDB file is opened at the first access in each process, so the dataset can be passed to
    worker processes, forked or spawned. Raises FileNotFoundError if there is no store, ValueError
    for an empty or damaged one and for an LMDB file of another layout or version. An access raises
    KeyError for a missing record and ValueError for a damaged one, with its index.
    """

    def __init__(self, folder):
        self.folder = str(folder)
        if not (Path(folder) / "data.mdb").is_file():
            raise FileNotFoundError(f"no store in {folder}: `append_records` writes one")
        self.length = count_records(folder)
        if self.length == 0:
            raise ValueError(f"the store in {folder} is empty: `append_records` writes to it")

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image, header = read_record(self.folder, index, self.length, decode_record)
        return image, header["caption"]


# -------------------------------------------------------------------------------------- reading


def read_record(folder, index: int, length: int, parse: Callable):
    """Return parse(record) for one record of a store.

    index: 0 … length - 1
    length: the number of records in the store
    parse: a function of the record; the record is a buffer that is valid only during the call

    Raises IndexError for an index out of range, KeyError if the record is missing, ValueError if
    it is damaged.
    """
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length} in {folder}")
    with open_reader(folder) as transaction:
        record = transaction.get(record_key(index))
        if record is None:
            raise KeyError(f"record {index} is missing in {folder}, which has {length} records")
        try:
            return parse(record)
        except (*DECODE_ERRORS, KeyError) as error:
            raise ValueError(f"record {index} in {folder} is damaged: {error}") from error


def read_headers(folder) -> Iterator[dict]:
    """Yield the header of each record, in order, without decoding the images."""
    length = count_records(folder)
    return (read_record(folder, index, length, parse_header) for index in range(length))


def read_captions(folder) -> Iterator[str]:
    """Yield the caption of each record, in order."""
    return (header["caption"] for header in read_headers(folder))


def count_records(folder) -> int:
    """Return the number of records in a store; 0 if there is no store.

    Raises ValueError if the folder contains an LMDB file that is not a store.
    """
    return _parse_count(read_metadata(folder), folder)


def _parse_count(metadata: bytes | None, folder) -> int:
    """Check the metadata of a store and return its number of records."""
    if metadata is None:
        return 0
    try:
        fields = json.loads(metadata)
        layout, version = fields["layout"], fields["version"]
    except (TypeError, ValueError, KeyError):
        layout = version = None
    if layout != LAYOUT:
        raise ValueError(
            f"{folder} holds an LMDB, but not one that ImageCaptionStore can read: its metadata,"
            f' under the key "{METADATA_KEY.decode()}", is missing or describes another layout'
        )
    if version not in (1, VERSION):
        raise ValueError(
            f"{folder} has layout version {version}; this code reads versions 1 and {VERSION}"
        )
    return fields["count"]


# -------------------------------------------------------------------------------------- writing


def append_records(folder, records: Iterable, per_transaction: int = 256) -> Iterator[int]:
    """Append records to a store, which is created if there is none.

    records: (image, caption) or (image, caption, extra_fields); see `encode_record`
    per_transaction: number of records that are committed at once

    A generator, which writes only as it is iterated. After each commit it yields once for each
    record of this commit: the number of records in the store up to and including this one. If the
    process is killed, the store contains whole transactions, and `count_records` tells from which
    record to resume.
    """
    with open_writer(folder) as environment:
        # The metadata is read only once. From then on this writer knows what it has written, and
        # `commit` raises if another process has changed it.
        metadata = read_metadata(folder)
        count = _parse_count(metadata, folder)
        records = iter(records)
        while True:
            chunk = itertools.islice(records, per_transaction)
            encoded = [encode_record(*record) for record in chunk]
            if not encoded:
                return
            previous_metadata = metadata
            metadata = json.dumps(
                {"layout": LAYOUT, "version": VERSION, "count": count + len(encoded)}
            ).encode()
            items = [(record_key(count + i), record) for i, record in enumerate(encoded)]
            commit(environment, items, metadata, previous_metadata)
            for _ in encoded:
                count += 1
                yield count


def store_files(
    folder,
    samples: Iterable,
    load_image: Callable,
    settings: dict,
    show_progress: bool = True,
    total: int | None = None,
) -> tuple[int, dict[str, str]]:
    """Write image files into a store; to an existing store, append those that it lacks.

    samples: tuples (name, caption, source)
        name: describes where the image is from, for messages
        source: the image file as a Path, or its content as bytes; for a sample without a usable
            image or caption, a str with the reason, and the sample is skipped
    load_image: a function from a binary stream to uint8 [H, W, 3]
    settings: everything else that the stored images depend on, such as {"size": 128}
    show_progress: show a progress bar
    total: the number of samples, for the progress bar, if `samples` has no length

    A record is identified by a hash of its file's content and caption, not by its name. An
    interrupted call is therefore resumed by the same call. Returns the number of records in the
    store and a dict from the name of each skipped sample to the reason. Raises ValueError if the
    store was written with other settings.
    """
    recover(folder)
    stored_names = {}  # content hash → name
    if count_records(folder):
        for header in read_headers(folder):
            if header.get("settings") != settings or "content" not in header:
                raise ValueError(
                    f"{folder} was built with other settings, {header.get('settings')}, not"
                    f" {settings}: use another folder or remove this one"
                )
            stored_names[header["content"]] = header["file"]

    skipped: dict[str, str] = {}
    samples = tqdm(
        samples, desc=f"writing {folder}", total=total, disable=not show_progress, unit="image"
    )
    records = _new_records(samples, load_image, settings, stored_names, skipped)
    for _ in append_records(folder, records):
        pass
    return count_records(folder), skipped


def _new_records(samples, load_image, settings, stored_names, skipped) -> Iterator[tuple]:
    """Yield (image, caption, extra_fields) of each sample that a store lacks.

    Adds new records to `stored_names` and the reasons of skipped samples to `skipped`.
    """
    for name, caption, source in samples:
        name = name.encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8
        if isinstance(source, str):
            reason = source
            skipped[name] = reason
            continue
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
            content_hash = _hash_content(caption, data)
            if content_hash not in stored_names:
                image = torch.from_numpy(load_image(io.BytesIO(data))).permute(2, 0, 1)
                fields = {"file": name, "content": content_hash, "settings": settings}
                yield image, caption, fields
                # The generator goes on here when the next record is asked for.
                stored_names[content_hash] = name
            elif stored_names[content_hash] != name:
                skipped[name] = f"the same image and caption as {stored_names[content_hash]}"
        except DECODE_ERRORS as error:
            # A damaged file, or a caption that cannot be encoded in UTF-8.
            reason = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))  # Pillow names the stream
            skipped[name] = reason or type(error).__name__


def _hash_content(caption: str, data: bytes) -> str:
    """Hash a caption and the content of its image file: 32 hexadecimal digits."""
    return hashlib.blake2b(caption.encode() + b"\0" + data, digest_size=16).hexdigest()


# ------------------------------------------------------------------------------- record encoding


def encode_record(image, caption: str, extra_fields: dict | None = None) -> bytes:
    """Encode one record: length of the header, header, image.

    image: uint8 [3, H, W]; a film, uint8 [F, 3, H, W]; or the content of an image file as bytes,
        which is stored unchanged
    extra_fields: further fields of the header; JSON must be able to represent them
    """
    shape_field = {}
    if not isinstance(image, (bytes, bytearray)):
        if isinstance(image, np.ndarray):
            image = np.ascontiguousarray(image)  # torch has no negative strides
        image = torch.as_tensor(image)
        shape = list(image.shape)
        if image.dtype != torch.uint8 or len(shape) not in (3, 4) or shape[-3] != 3:
            raise ValueError(
                f"an image is uint8 [3, H, W], a film [F, 3, H, W], not {image.dtype} {shape}"
            )
        shape_field = {"shape": shape}
        image = image.contiguous().numpy().tobytes()
    if not isinstance(caption, str):
        raise TypeError(f"a caption is a str, not {caption!r}")
    fields = {"caption": caption} | (extra_fields or {}) | shape_field
    header = json.dumps(fields, ensure_ascii=False).encode()
    return struct.pack("<I", len(header)) + header + image


def split_record(record) -> tuple[dict, bytes | memoryview]:
    """Split one record, bytes or a buffer, into its header and the content after the header.

    The header is a dict with at least a caption. Raises ValueError or struct.error if the record
    has no such header.
    """
    (length,) = struct.unpack_from("<I", record)
    header = json.loads(bytes(record[4 : 4 + length]))
    if not isinstance(header, dict) or not isinstance(header.get("caption"), str):
        raise ValueError("its header has no caption")
    return header, record[4 + length :]


def parse_header(record) -> dict:
    """Return the header of one record, bytes or a buffer."""
    header, _ = split_record(record)
    return header


def decode_record(record) -> tuple[torch.Tensor, dict]:
    """Return (image uint8 [3, H, W] or [F, 3, H, W], header) of one record, bytes or a buffer."""
    header, content = split_record(record)
    if "shape" in header:
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return pixels.view(header["shape"]), header
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), header


def record_key(index: int) -> bytes:
    """Return the key of record `index`: nine decimal digits."""
    return b"%09d" % index
