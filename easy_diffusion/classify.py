"""Which caption explains an image best: python -m easy_diffusion.classify IMAGE… --captions FILE

FILE is a text file with a caption in each line. A text-to-image model, by default the one of this
repository, compares how well each caption predicts the noise in the image; see
evaluation/diffusion_classifier.py. For each image the command prints the five best captions with
their score behind the best, in nats, and its standard error. "(none of these)" is the model without
a caption: it wins if no caption fits.

>>> options = parse_options(["dish.png", "--captions", "menu.txt"])
>>> [path.name for path in options.images], options.captions.name, options.weights.name
(['dish.png'], 'menu.txt', 'weights')
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from .command_line import run_command
from .evaluation.diffusion_classifier import Round, classify, rank
from .generate import load_x0
from .networks.text_encoder import CharacterEncoder
from .pretrained import WEIGHTS, find_sizes, load_model
from .training.distributed import check_gpu

NONE_OF_THESE = ""              # the caption of the unconditional model
SHOWN = 5                       # captions that are printed for each image


def parse_options(arguments) -> argparse.Namespace:
    """Parse the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.classify",
        description="Find the caption that explains an image best, with a text-to-image model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image files")
    parser.add_argument(
        "--captions", type=Path, required=True, metavar="FILE", help="a caption in each line, UTF-8"
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FOLDER",
        help="folder with the trained networks",
    )
    parser.add_argument(
        "--size", type=int, default=argparse.SUPPRESS,
        help="size of the model's images in pixels (default: the smallest in --weights)",
    )
    options = parser.parse_args(arguments)
    if not hasattr(options, "size"):
        options.size = min(find_sizes(options.weights), default=None)
    return options


def main(arguments=None) -> int:
    """Classify images; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    check_gpu()
    lines = read_captions(options.captions)
    network, encoder, diffusion, autoencoder = load_model(options.weights, options.size)
    images = [load_x0(path, options.size, autoencoder) for path in options.images]
    captions = [*choose_known(lines, encoder), NONE_OF_THESE]
    for path, x0 in zip(options.images, images):
        x0 = x0.to(next(network.parameters()).device)
        bar = partial(tqdm, desc=path.name, unit="batch", leave=False)
        rounds = list(classify(network, diffusion, encoder, x0, captions, progress=bar))
        print_ranking(path, captions, rounds)
    return 0


def read_captions(path: Path) -> list[str]:
    """The different captions of a text file, one in each line; empty lines are left out.

    Raises ValueError for a file that is empty or not UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        raise ValueError(message) from None
    captions = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not captions:
        raise ValueError(f"{path} has no caption")
    return captions


def choose_known(captions: list[str], encoder: CharacterEncoder) -> list[str]:
    """The captions whose characters the encoder knows; the others are named and left out.

    Raises ValueError if none is left.
    """
    known = [caption for caption in captions if set(caption) <= encoder.index.keys()]
    unknown = "、".join(sorted(set("".join(captions)) - encoder.index.keys()))
    if not known:
        raise ValueError(f"no caption has only characters that the model knows; not {unknown}")
    if len(known) < len(captions):
        print(f"note: {len(captions) - len(known)} captions left out: the model does not know "
              f"{unknown}", file=sys.stderr)
    return known


def print_ranking(path: Path, captions: list[str], rounds: list[Round]) -> None:
    """Print the best captions, each with its score behind the best in its last round."""
    print(path)
    best, *_ = order = rank(rounds)
    for place, i in enumerate(order[:SHOWN], 1):
        last = [each for each in rounds if i in each.ranking][-1]
        k = last.ranking.index(i)
        behind = last.scores[k] - last.scores[last.ranking.index(best)]
        error = last.standard_errors[k]
        print(f"  {place}  {behind:8.1f} ± {error:.1f}  {captions[i] or '(none of these)'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
