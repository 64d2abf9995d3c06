"""What all commands share: ranges of numbers, and one line in place of a traceback.

`check_ranges` refuses numbers that are out of range, not a number or infinite, when the options are
read, and `check_writable` a folder that cannot be written to before the long work begins.
`run_command` calls the main function of a command; its exit status is

    0      the command has done its work
    2      an option, a file or the disk does not allow it; the message says which
    130    it was interrupted by Ctrl+C

>>> def main():
...     raise ValueError("--size must be a multiple of 8")
>>> run_command(main)
2
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

RESUMES = "interrupted; the same command resumes from the last checkpoint, if there is one"
EXPECTED_ERRORS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)


def check_ranges(parser: argparse.ArgumentParser, options, ranges: dict[str, tuple]) -> None:
    """End the program with a message if an option is out of its range.

    ranges: {name: (least, greatest)}, both included; math.inf: no limit, but the value is finite.
    An option that is None is not checked.
    """
    for name, (least, greatest) in ranges.items():
        value = getattr(options, name)
        if value is None or (math.isfinite(value) and least <= value <= greatest):
            continue
        if greatest == math.inf:
            allowed = f"{least:g} or more"
        else:
            allowed = f"from {least:g} to {greatest:g}"
        parser.error(f"--{name.replace('_', '-')} must be {allowed}, not {value:g}")


def check_writable(folder: Path) -> None:
    """Create a folder, and raise OSError unless files can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def run_command(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Return the exit status of main(); an expected error becomes one line on stderr.

    interrupted: what to say after Ctrl+C, such as what was kept.

    A console that lacks a character, such as one of a Western Windows, shows its code in its place.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # not that of a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except EXPECTED_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
