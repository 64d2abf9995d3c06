"""Atomic writing: other programs see the old file or the new one, never an incomplete one.

A file is written under a temporary name on the same disk, flushed, and renamed to its final name.
Renaming is atomic on POSIX systems and on Windows (`os.replace`). Checkpoints, films, logs and
weights are all written in this way. The file needs nothing but the standard library.

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
    """Yield a temporary path to write to; it replaces `path` on success and is removed on an error.

    The temporary file is in a folder of its own beside `path`; the caller may write other files
    into that folder, too. A killed process leaves the folder behind. The next call for the same
    `path` removes it.
    """
    path = Path(path)
    folder = path.with_name(f"{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        # Windows flushes only a file that is open for writing, hence "r+b" and not "rb".
        with open(folder / path.name, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path, data: bytes) -> None:
    """Write `data` to `path`; the folder is created if it does not exist."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
