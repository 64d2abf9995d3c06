"""What the commands have in common before they begin: options of a training, and early checks.

    prepare_command             checks what would otherwise fail only at the end
    add_training_options        the options of train_control, train_motion and train_sound
    check_training_options      and their ranges
    check_size                  of images that the demo's networks can have

>>> parser = argparse.ArgumentParser()
>>> add_training_options(parser, minutes=8.0, batch_size=32, out="out/control", items="images")
>>> parser.parse_args(["--minutes", "3"]).minutes
3.0
"""

import argparse
import math
from pathlib import Path

from .command_line import check_ranges, check_writable
from .images import load_chinese_font
from .presets import SIZE
from .pretrained import WEIGHTS
from .training.distributed import check_gpu


def prepare_command(out: Path) -> None:
    """Check, before the work, the GPU, the folder of the results and the font of the captions.

    Raises SystemExit for a GPU that this PyTorch cannot use, and OSError for a folder that cannot
    be written to, or a missing font.
    """
    check_gpu()
    check_writable(out)
    load_chinese_font(12)


def add_training_options(group, minutes: float, batch_size: int, out: str, items: str) -> None:
    """Add the options of the commands that train more for a text-to-image model of pixels.

    minutes, batch_size, out: the defaults. items: of a batch, such as "images".
    """
    group.add_argument("--minutes", type=float, default=minutes, help="training time")
    group.add_argument(
        "--size", type=int, default=SIZE, help="height and width of the model's images in pixels"
    )
    group.add_argument(
        "--batch-size", type=int, default=batch_size, help=f"{items} per training step"
    )
    group.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FOLDER",
        help="folder with the text-to-image model, which was trained on pixels",
    )
    group.add_argument(
        "--out", type=Path, default=Path(out), metavar="FOLDER",
        help="folder for the data, the checkpoint and the results",
    )


def check_training_options(parser: argparse.ArgumentParser, options, **ranges) -> None:
    """End the program with a message if an option of `add_training_options` is out of range.

    ranges: (lowest, highest) of further options, by name.
    """
    check_size(parser, options.size)
    ranges |= {"minutes": (1e-3, math.inf), "batch_size": (1, math.inf)}
    check_ranges(parser, options, ranges)


def check_size(parser: argparse.ArgumentParser, size: int) -> None:
    """End the program with a message if the demo's networks cannot have this image size."""
    if size % 8 or not 32 <= size <= 512:
        parser.error(f"--size must be a multiple of 8 from 32 to 512, not {size}")
