"""Atomic writing: a reader sees the old file or the new one, never half of one.

A file is written under a temporary name on the same disk, flushed, and renamed onto its final name.
Renaming is atomic on POSIX systems and on Windows (`os.replace`). Checkpoints, films, logs and weights
are all written through this file. It needs nothing but the standard library.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "log.csv"
>>> write_atomically(path, b"index,loss")
>>> path.read_text()
'index,loss'
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces `path`, on an error it is removed.

    The temporary file lies in a folder beside `path`, which the caller may also write other files into.
    A killed process leaves that folder behind; the next call for the same `path` removes it.
    """
    path = Path(path)
    folder = path.with_name(f"{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        with open(folder / path.name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path, data: bytes) -> None:
    """Write `data` to `path`, creating its folder if it is missing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
