"""Train a model of films on drawn dishes: python -m easy_diffusion.train_motion

It starts from the text-to-image model in --weights, adds motion modules (networks/motion.py), and
trains both on films of drawn dishes (datasets/dish_films.py). With --frozen only the motion modules
and the text encoder are trained. The same command resumes an interrupted training. The files in
--out are

    weights/                        the trained model, text_to_film_64.safetensors
    films_64.gif                    films of held-out dishes, one row for each motion
    films_64_8/                     the LMDB store of the films of 8 frames that it is trained on
    training_films_64_8.safetensors the checkpoint of the training; ..._frozen with --frozen

>>> options = parse_options(["--minutes", "3", "--frames", "4"])
>>> options.minutes, options.frames, options.size
(3.0, 4, 64)
"""

import argparse
import math
import random
import sys
from functools import partial
from pathlib import Path

import torch

from datasets.dish_films import FPS, FRAMES, MOTIONS, DishFilms
from datasets.dishes import dish_names

from .animation.film import mosaic, write_film
from .command_line import RESUMES, run_command
from .command_setup import add_training_options, check_training_options, prepare_command
from .film_presets import BATCH, GPU_BATCH, Films, generate_films, inflate_model
from .presets import prepare_dishes, train_demo
from .pretrained import Model, load_pixel_model, save_model
from .training.checkpoint import load_checkpoint, load_ema_weights
from .training.progress import track_progress

SHOWN = 4                       # held-out dishes on the sheet, for each motion
STEPS = 25                      # of the sampler


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.train_motion",
        description="Train a model of films on drawn dishes that move.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--films", type=int, default=20_000 if cuda else 3000,
        help="number of films to train on; they are drawn first",
    )
    parser.add_argument("--frames", type=int, default=FRAMES, help="frames of a film")
    parser.add_argument(
        "--frozen", action="store_true",
        help="keep the weights of the image network; train motion modules and text encoder",
    )
    add_training_options(
        parser,
        minutes=4.0 if cuda else 12.0,
        batch_size=GPU_BATCH if cuda else BATCH,
        out="out/motion",
        items="films",
    )
    options = parser.parse_args(arguments)
    check_training_options(parser, options, frames=(2, 64), films=(options.batch_size, math.inf))
    return options


def main(arguments=None) -> int:
    """Train a model of films; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    model = load_pixel_model(options.weights, options.size)
    films = prepare_dishes(
        options.out / f"films_{options.size}_{options.frames}", options.films, options.size,
        partial(DishFilms, frames=options.frames),
    )
    torch.manual_seed(0)
    model = inflate_model(model)
    name = f"films_{options.size}_{options.frames}{'_frozen' * options.frozen}"
    checkpoint = options.out / f"training_{name}.safetensors"
    steps = train_on_films(
        model, films, options.minutes, options.batch_size, checkpoint, options.frozen
    )
    training = {"steps": steps, "frames": options.frames}
    save_model(options.out / "weights", options.size, model, training)
    path = options.out / f"films_{options.size}.gif"
    write_films(path, model, options.size, options.frames)
    for written in (options.out / "weights", path):
        print(f"wrote {written}")
    return 0


def train_on_films(
    model: Model, films, minutes: float, batch_size: int, checkpoint: Path, frozen: bool = False
) -> int:
    """Train an inflated model on a store of films, or resume its training; returns the steps.

    model: of `inflate_model`; it ends with its EMA weights, in eval mode.
    minutes: training time. checkpoint: file to save to and to resume from.
    frozen: whether the image network keeps its weights.
    """
    network, encoder, diffusion, _ = model
    if frozen:
        network.requires_grad_(False)
        for parameter in network.motion_parameters():
            parameter.requires_grad_(True)
    steps = train_demo(
        network.train(), encoder.train(), diffusion, Films(films), checkpoint, minutes, batch_size
    )
    for _ in track_progress(steps, description="training on films"):
        pass
    saved = load_checkpoint(checkpoint)
    load_ema_weights(network, encoder, diffusion, saved)
    network.eval()
    encoder.eval()
    return saved["index"]


def write_films(path: Path, model: Model, size: int, frames: int) -> None:
    """Write a looping GIF with films of held-out dishes, a row for each motion."""
    dishes = random.Random(0).sample(dish_names("held_out"), SHOWN)
    names = [prefix + dish for prefix in MOTIONS.values() for dish in dishes]
    films = [generate_films(model, [name], frames, size, STEPS)[0] for name in names]
    sheet = mosaic([list(film) for film in films], names, columns=SHOWN, side=2 * size)
    write_film(path, sheet, FPS)


if __name__ == "__main__":
    sys.exit(run_command(main, RESUMES))
