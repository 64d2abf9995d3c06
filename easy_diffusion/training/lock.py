"""One training at a time for a checkpoint: the second is refused.

While it runs, a training has a file beside its checkpoint, PATH.lock, with the process id and the
computer's name. A lock of a process that no longer exists on this computer is taken over. The file
needs torch, accelerate, psutil and, beside it, distributed.py.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
>>> with training_lock(path):
...     Path(f"{path}.lock").exists()
True
>>> Path(f"{path}.lock").exists()
False
"""

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from .distributed import any_rank


@contextlib.contextmanager
def training_lock(path) -> Iterator[None]:
    """Hold the lock of the checkpoint `path` for the length of a `with` block; None: no lock.

    Raises BlockingIOError, which names process and computer, if another training holds it. A second
    training of the same process is not refused: in a notebook, the first was given up.
    """
    if path is None:
        yield
        return
    lock = Path(f"{path}.lock")
    owner = {
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
        "computer": platform.node(),
        "training": uuid.uuid4().hex,
    }
    take_lock(lock, owner)
    try:
        yield
    finally:
        if read_lock(lock) == owner:
            lock.unlink(missing_ok=True)


def locked(steps: Iterator, path, accelerator) -> Iterator:
    """Yield the steps of a training while the main process holds the lock of its checkpoint.

    Raises BlockingIOError in all processes if another training holds it.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(training_lock(path))
            except BlockingIOError as refusal:
                error = refusal
        if any_rank(accelerator, error is not None):
            raise error or BlockingIOError(f"another training writes to {path}")
        yield from steps


def take_lock(lock: Path, owner: dict) -> None:
    """Create the lock file, in place of one whose process has ended; else raise BlockingIOError."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with open(lock, "x", encoding="utf-8") as file:     # fails if the file exists
                json.dump(owner, file)
            return
        except FileExistsError:
            check_lock(lock)
            lock.unlink(missing_ok=True)


def check_lock(lock: Path) -> None:
    """Raise BlockingIOError if the lock file is of another process that may still run."""
    owner = read_lock(lock)
    if owner is None:           # another process is just writing it, or it was damaged
        time.sleep(0.5)
        owner = read_lock(lock)
    if owner is None or owner["process"] == os.getpid():
        return
    if owner["computer"] == platform.node() and not is_running(owner):
        return
    raise BlockingIOError(
        f"another training writes to {lock.with_suffix('')}: process {owner['process']} on "
        f"{owner['computer']}; stop it, or use another file. If it no longer runs, delete {lock}"
    )


def read_lock(lock: Path) -> dict | None:
    """The owner of a lock file; None if there is no file, or a damaged one."""
    try:
        owner = json.loads(lock.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_owner = isinstance(owner, dict) and owner.keys() >= {"process", "started", "computer"}
    return owner if is_owner else None


def is_running(owner: dict) -> bool:
    """Whether the process exists on this computer; process ids are used again, times are not."""
    try:
        process = psutil.Process(owner["process"])
        is_same = abs(process.create_time() - owner["started"]) < 1
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
