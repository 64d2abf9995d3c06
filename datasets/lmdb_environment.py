"""Reading and writing an LMDB file safely, from several processes.

LMDB is an embedded key–value database. A process opens the file as an *environment*, and reads and
writes in *transactions*. One process may write while others read. This file adds to LMDB:

- A file is opened once per process, whatever the number of datasets that read it (`open_reader`).
- The file grows when it is full (`commit`).
- A second writer is detected, in the same process (`open_writer`) and in another (`commit`).
- The last commit of a writer that was killed is completed (`recover`).

A commit can write *metadata*, any bytes, under the key "about". The metadata must change with each
commit, for example because it contains the number of records; this is how `commit` detects another
writer.

The file needs lmdb.

>>> import tempfile
>>> folder = tempfile.mkdtemp()
>>> with open_writer(folder) as environment:
...     commit(environment, [(b"key", b"value")], metadata=b"1 record")
>>> with open_reader(folder) as transaction:
...     bytes(transaction.get(b"key"))
b'value'
>>> read_metadata(folder)
b'1 record'
"""

import contextlib
import os
import shutil
from pathlib import Path

import lmdb

METADATA_KEY = b"about"

# LMDB forbids opening a file twice in one process. This dict therefore keeps each environment that
# is open in this process. A key is (process id, device of the file, inode of the file); the process
# id is in it because a forked process inherits the dict, but must not use its environments.
_environments: dict[tuple, lmdb.Environment] = {}
_writers: set[tuple] = set()  # the keys of the environments that are open for writing


@contextlib.contextmanager
def open_reader(folder):
    """Open a read transaction on an LMDB folder; the values that it returns are buffers.

    A buffer is valid only inside the `with` statement. The environment stays open for later calls.
    While this process writes to the file, its reads use the environment of the writer. Raises
    ValueError if the file is damaged or is not LMDB.
    """
    file = os.stat(f"{folder}/data.mdb")
    key = (os.getpid(), file.st_dev, file.st_ino)
    if key not in _environments:
        # Readers write to a lock file. Without permission to write, do not use one. The operating
        # system should not read ahead, because records are read in random order.
        lock = f"{folder}/lock.mdb"
        can_lock = os.access(lock if os.path.exists(lock) else folder, os.W_OK)
        _environments[key] = open_environment(
            folder, readonly=True, lock=can_lock, readahead=False
        )
        check_length(folder, _environments[key], file.st_size)
    environment = _environments[key]
    try:
        transaction = environment.begin(buffers=True)
    except lmdb.MapResizedError:  # another process has made the file grow: map its new size
        environment.set_mapsize(0)
        transaction = environment.begin(buffers=True)
    with transaction:
        yield transaction


def open_environment(folder, **options) -> lmdb.Environment:
    """Open an LMDB environment. Raises ValueError if the file is damaged or is not LMDB."""
    try:
        try:
            return lmdb.open(str(folder), **options)
        except lmdb.Error:
            # lmdb 2 and newer refuse to open a file that was open before a fork, until this
            # process has closed what it inherited. With older versions, which do not refuse,
            # closing it would break the reads of the parent process.
            inherited = [key for key in _environments if key[0] != os.getpid()]
            if not inherited:
                raise
            for key in inherited:
                _environments.pop(key).close()
            return lmdb.open(str(folder), **options)
    except lmdb.Error as error:
        raise ValueError(f"{folder} cannot be opened as LMDB: {error}") from error


def check_length(folder, environment, length: int) -> None:
    """Raise ValueError if the file is shorter than its pages.

    Reading a page that a file no longer has would end the process with SIGBUS.
    """
    page_size = environment.stat()["psize"]
    needed = (environment.info()["last_pgno"] + 1) * page_size
    if length < needed:
        raise ValueError(
            f"{folder} is damaged: data.mdb has {length} bytes of {needed}; copy it again"
        )


@contextlib.contextmanager
def open_writer(folder):
    """Open an LMDB environment for writing; the folder is created if needed.

    Closes the environment that this process has used for reading. Raises RuntimeError if this
    process is already writing to the file, ValueError if the file is damaged or is not LMDB.
    """
    path = Path(folder) / "data.mdb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    file = path.stat()
    key = (os.getpid(), file.st_dev, file.st_ino)
    if key in _writers:
        raise RuntimeError(
            f"{folder} is being written to by this process already: finish that first"
        )
    if key in _environments:
        _environments.pop(key).close()
    # Not more: Windows makes the file as long as the map. `commit` doubles it when it is full.
    environment = open_environment(folder, map_size=max(2**26, file.st_size))
    _environments[key] = environment
    _writers.add(key)
    try:
        # Commit the metadata unchanged, which completes the last commit of a killed writer.
        # A write transaction sees that commit; a read transaction does not yet.
        repeat_metadata(environment)
        yield environment
    finally:
        _writers.discard(key)
        _environments.pop(key, None)
        environment.close()


def repeat_metadata(environment) -> None:
    """Write the metadata again, unchanged, in a transaction of its own."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                metadata = transaction.get(METADATA_KEY)
                if metadata is not None:
                    transaction.put(METADATA_KEY, metadata)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def read_metadata(folder) -> bytes | None:
    """Return the metadata in an LMDB folder; None if nothing has been written to the folder.

    Returns b"" for an LMDB file that contains other keys and no metadata.
    """
    file = Path(folder) / "data.mdb"
    if not file.is_file() or file.stat().st_size == 0:  # empty: a writer was killed at its start
        return None
    with open_reader(folder) as transaction:
        metadata = transaction.get(METADATA_KEY)
        if metadata is not None:
            return bytes(metadata)
        has_entries = transaction.stat()["entries"] > 0
        return b"" if has_entries else None


def commit(
    environment,
    items: list[tuple[bytes, bytes]],
    metadata: bytes | None = None,
    previous_metadata: bytes | None = None,
) -> None:
    """Write items (key, value) in one transaction.

    LMDB limits the size of its file to map_size; the limit is doubled whenever it is reached.

    environment: what `open_writer` returns
    metadata: new metadata, written in the same transaction; None leaves it unchanged
    previous_metadata: the metadata that this writer has read or written last (None: there was none)

    Raises RuntimeError if the stored metadata is not `previous_metadata`: another process has
    written to the store. Raises OSError if the disk does not accept the data. In both cases
    nothing is written, and earlier commits stay as they are.
    """
    while True:
        try:
            with environment.begin(write=True) as transaction:
                if metadata is not None:
                    if transaction.get(METADATA_KEY) != previous_metadata:
                        raise RuntimeError(
                            f"another process is writing to {environment.path()}, too: the last"
                            " records of this process are not stored"
                        )
                    transaction.put(METADATA_KEY, metadata)
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapResizedError:
            environment.set_mapsize(0)  # adopt the size that another process has set
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
        except lmdb.Error as error:
            free = shutil.disk_usage(environment.path()).free / 1e6
            raise OSError(
                f"{environment.path()} cannot be written to: {error}; {free:.1f} MB are free"
                " there. The records of earlier transactions are stored"
            ) from error


def recover(folder) -> None:
    """Complete the last commit of a writer that was killed.

    Call this function before you read the metadata in order to resume writing. A writer may be
    killed after its commit has reached the file, but before the readers have been told. Then the
    file contains the commit, and readers do not see it until the next commit. `open_writer` makes
    such a commit, so it is enough to open and close the file for writing.
    """
    if read_metadata(folder) is not None:
        with open_writer(folder):
            pass
