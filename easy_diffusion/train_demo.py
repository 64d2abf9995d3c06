"""Train the demo's models from scratch: python -m easy_diffusion.train_demo

It draws a data set of dishes, trains a network on it, and compares the result with the models of
this repository. With --latent it first trains an autoencoder on the same dishes, and then the
network on its latents: twice the image size at about the same cost per step. The same command
resumes an interrupted training; a finished one is not repeated. The files in --out are

    weights/               the trained model, for the option --weights of easy_diffusion.demo
    held_out_64.png        held-out dishes: from this training (left), from --weights (middle, if it
                           has a model of this size), and drawn (right)
    loss_64.png            the training loss
    autoencoder_128.png    with --latent: held-out dishes and their reconstructions
    dishes_64/, latents_128/, model_64.safetensors, autoencoder_128*.safetensors
                           the data sets and the checkpoints of the trainings

A held-out dish is a combination of ingredients that the training data does not contain. The data
sets, networks and hyperparameters are in presets.py.

>>> options = parse_options(["--latent", "--minutes", "5"])
>>> options.size, options.autoencoder_minutes
(128, 5.0)
>>> plot_loss([0.5, 0.4, 0.3])[1:4]
b'PNG'
"""

import argparse
import io
import itertools
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from datasets.dishes import dish_names

from .command_line import RESUMES, check_ranges, run_command
from .command_setup import check_size, prepare_command
from .files import write_atomically
from .generate import make_held_out_sheet
from .images import encode_png
from .networks.autoencoder import load_autoencoder
from .networks.weights_io import load_weights
from .presets import (
    BATCH,
    DISHES,
    GPU_BATCH,
    LATENT_BATCH,
    LATENT_SIZE,
    SIZE,
    build_networks,
    default_batch_size,
    default_minutes,
    describe_training,
    prepare_dishes,
    prepare_latents,
    train_or_load,
)
from .pretrained import (
    WEIGHTS,
    Model,
    autoencoder_path,
    find_sizes,
    load_model,
    save_model,
)
from .training.checkpoint import load_checkpoint


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.train_demo",
        description="Train the demo's models from scratch on drawn dishes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, default=default_minutes(),
        help="training time of the network in minutes; a finished training is not repeated",
    )
    parser.add_argument(
        "--dishes", type=int, default=DISHES,
        help="number of drawn dishes to train on",
    )
    parser.add_argument(
        "--size", type=int, default=argparse.SUPPRESS,
        help="height and width of the images in pixels, a multiple of 8 "
        f"(default: {SIZE}, or {LATENT_SIZE} with --latent)",
    )
    parser.add_argument(
        "--latent", action="store_true",
        help="train an autoencoder first, and the network on its latents",
    )
    parser.add_argument(
        "--batch-size", type=int, default=argparse.SUPPRESS,
        help="images per training step "
        f"(default: {GPU_BATCH} on a GPU; {BATCH}, or {LATENT_BATCH} with --latent, on a CPU)",
    )
    parser.add_argument(
        "--autoencoder-minutes", type=float, default=argparse.SUPPRESS,
        help="training time of the autoencoder in minutes (default: that of --minutes)",
    )
    parser.add_argument(
        "--initial-weights", type=Path, metavar="FOLDER",
        help="start from the weights in this folder, where it has a file of the same name, "
        "instead of random weights",
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="compile the network with torch.compile: minutes to start, then faster steps",
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FOLDER",
        help="trained weights to compare the result with",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="FOLDER",
        help="folder for the drawn dishes, the checkpoints and the results",
    )
    options = parser.parse_args(arguments)
    if not hasattr(options, "size"):
        options.size = LATENT_SIZE if options.latent else SIZE
    if not hasattr(options, "batch_size"):
        options.batch_size = default_batch_size(options.latent)
    if not hasattr(options, "autoencoder_minutes"):
        options.autoencoder_minutes = options.minutes
    check_size(parser, options.size)
    check_ranges(parser, options, {
        "minutes": (1e-3, math.inf),
        "autoencoder_minutes": (1e-3, math.inf),
        "batch_size": (1, math.inf),
        "dishes": (options.batch_size, math.inf),
    })
    if options.initial_weights and not options.initial_weights.is_dir():
        parser.error(f"--initial-weights {options.initial_weights} is not a folder")
    return options


def main(arguments=None) -> int:
    """Train, export the weights, compare; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU cores"
    print(f"training on {device}; all files are in {options.out}/", flush=True)
    model, losses = train_and_save(options)

    # The models to compare
    models = [model]
    if options.size in find_sizes(options.weights):
        models.append(load_model(options.weights, options.size))
    suffix = file_suffix(options)
    sheet_path = options.out / f"held_out_{suffix}.png"
    loss_path = options.out / f"loss_{suffix}.png"
    write_atomically(loss_path, plot_loss(losses))
    write_atomically(sheet_path, encode_png(make_held_out_sheet(models, options.size)))
    for path in (options.out / "weights", loss_path, sheet_path):
        print(f"wrote {path}")
    return 0


def file_suffix(options) -> str:
    """What distinguishes the files of one model in --out: the size, and pixels or latents."""
    return f"{options.size}_latent" if options.latent else f"{options.size}"


def train_and_save(options) -> tuple[Model, list[float]]:
    """Train, or load what has been trained: (model, loss of each step).

    The model is also written to the folder weights/ in --out.
    """
    size = options.size
    initial = options.initial_weights
    store = prepare_dishes(options.out / f"dishes_{size}", options.dishes, size)
    autoencoder = None
    if options.latent:
        initial_autoencoder = None
        if initial and autoencoder_path(initial, size).exists():
            initial_autoencoder = load_autoencoder(autoencoder_path(initial, size))
        store, autoencoder = prepare_latents(
            store, options.out, size, options.autoencoder_minutes, initial=initial_autoencoder
        )

    # The seed gives the same initial weights, whatever has been loaded or trained before.
    torch.manual_seed(0)
    characters = "".join(dish_names("train"))
    network, encoder, diffusion = build_networks(characters, autoencoder)
    if initial and size in find_sizes(initial):
        initial_model = load_model(initial, size)
        load_weights(network, initial_model.network.state_dict())
        load_weights(encoder, initial_model.encoder.state_dict())
    parameters = itertools.chain(network.parameters(), encoder.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    data = "latents" if options.latent else "images"
    print(f"{weights / 1e6:.1f} M weights, for {data} {list(store[0][0].shape)}", flush=True)
    checkpoint = options.out / f"model_{file_suffix(options)}.safetensors"
    losses = train_or_load(
        network, encoder, diffusion, store, checkpoint, options.minutes,
        batch_size=options.batch_size, compile=options.compile,
    )

    model = Model(network, encoder, diffusion, autoencoder)
    training = describe_training(options.dishes, options.batch_size, options.latent) | {
        "steps": len(losses),
        "minutes": round(load_checkpoint(checkpoint)["seconds"] / 60, 1),
    }
    save_model(options.out / "weights", size, model, training)
    return model, losses


def plot_loss(losses: list[float]) -> bytes:
    """Plot the loss of each step and its running mean over 100 steps; returns a PNG file.

    If there are fewer losses, the running mean is over all of them.
    """
    window = min(100, len(losses))
    running_mean = np.convolve(losses, np.ones(window) / window, "valid")
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(losses, color="lightgrey", linewidth=0.5, label="each step")
    axes.plot(np.arange(window - 1, len(losses)), running_mean, label=f"mean of {window}")
    axes.set(
        xlabel="step", ylabel="loss", yscale="log", title=f"training, {len(losses)} steps"
    )
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main, RESUMES))
