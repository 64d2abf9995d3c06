"""From the name of a dish to an animated image.

    python -m easy_diffusion.demo 番茄炒鸡蛋 --move right

The first run draws a data set of dishes, trains a network on it from scratch, and saves both. A
later run loads them; an interrupted run is resumed by the same command. The trained network
generates the dish and inpaints what the camera's move uncovers. The files in --out are

    <name>_<move>.gif      the animated dish (or .mp4, .webp: --format)
    <name>.png             the dish
    <name>_all.gif         with --move all: all ten moves side by side
    all_<move>.gif         with several names: all of them side by side
    held_out_64.png        held-out dishes, generated (left) and drawn (right): combinations of
                           ingredients that the training data does not contain
    loss_64.png            the training loss
    autoencoder_128.png    with --latent: held-out dishes and their reconstructions

With --latent an autoencoder is trained first, on the same dishes, and the network is trained on its
latents: twice the image size at the same cost per step. With --image the camera moves over a
photograph instead of a generated dish, and --mask selects a region of it to inpaint first. With
--inpainter sd Stable Diffusion inpaints instead of the trained network.

The options are in demo_options.py; the data sets, networks and hyperparameters in presets.py.

>>> plot_loss([0.5, 0.4, 0.3])[1:4]
b'PNG'
"""

import io
import itertools
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from datasets.aipos import load_photo
from datasets.dishes import attributes, dish_names, draw_dish

from .animation.camera import MOVES
from .animation.film import animate, mosaic, write_film
from .demo_options import parse_options, read_mask
from .files import write_atomically
from .generate import generate_images, make_model_inpainter
from .images import contact_sheet, encode_png, load_chinese_font
from .inpainting.stable_diffusion_inpainter import make_stable_diffusion_inpainter
from .inpainting.stable_diffusion_pipeline import load_pipeline
from .presets import build_networks, prepare_dishes, prepare_latents, train_or_load
from .training.data_loader import derive_seed

# ------------------------------------------------------------------ networks


def prepare_model(options) -> tuple[tuple, list[Path]]:
    """Train the demo's networks, or load them: ((network, encoder, diffusion, autoencoder), paths).

    autoencoder is None without --latent. paths: the images of held-out dishes and of the loss.
    """
    size = options.size
    store = prepare_dishes(options.out / f"dishes_{size}", options.dishes, size)
    autoencoder = None
    suffix = f"{size}"
    if options.latent:
        store, autoencoder = prepare_latents(store, options.out, size, options.minutes)
        suffix = f"{size}_latent"

    # The seed gives the same initial weights, whatever has been loaded or trained before.
    torch.manual_seed(0)
    characters = "".join(dish_names("train"))
    network, encoder, diffusion = build_networks(characters, autoencoder)
    parameters = itertools.chain(network.parameters(), encoder.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    data = "latents" if options.latent else "images"
    print(f"{weights / 1e6:.1f} M weights, for {data} {list(store[0][0].shape)}", flush=True)
    checkpoint = options.out / f"model_{suffix}.safetensors"
    losses = train_or_load(network, encoder, diffusion, store, checkpoint, options.minutes)

    # Two images show the result; they are renewed if the checkpoint is newer.
    sheet_path = options.out / f"held_out_{suffix}.png"
    loss_path = options.out / f"loss_{suffix}.png"
    if not is_newer(loss_path, checkpoint):
        write_atomically(loss_path, plot_loss(losses))
    if not is_newer(sheet_path, checkpoint):
        sheet = make_held_out_sheet(
            network, encoder, diffusion, size, options.guidance, autoencoder
        )
        write_atomically(sheet_path, encode_png(sheet))
    return (network, encoder, diffusion, autoencoder), [sheet_path, loss_path]


def is_newer(path: Path, other: Path) -> bool:
    """Return whether `path` exists and was not written before `other`."""
    return path.exists() and path.stat().st_mtime >= other.stat().st_mtime


def make_held_out_sheet(
    network, encoder, diffusion, size: int, guidance: float, autoencoder=None, count: int = 12
) -> Image.Image:
    """Make a contact sheet of `count` held-out dishes, each generated (left) and drawn (right)."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    generated = generate_images(
        network,
        encoder,
        diffusion,
        names,
        size,
        guidance=guidance,
        show_progress=True,
        autoencoder=autoencoder,
    )
    drawn = [draw_dish(name, size, seed=1).transpose(1, 2, 0) for name in names]    # [H, W, 3]
    return contact_sheet([list(pair) for pair in zip(generated, drawn)], names, columns=3)


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


def make_inpainters(options, model, name: str, move: str) -> tuple:
    """Make two inpainters: for what lies beside the dish, and for what lies around it.

    model: Stable Diffusion's pipeline with --inpainter sd; otherwise the demo's (network,
    encoder, diffusion, autoencoder).
    The randomness depends on --seed and on the move alone, not on the other films of this call.
    """
    seed = derive_seed(options.seed, move)

    def progress(steps):
        return tqdm(steps, desc=f"{name}, {move}: inpainting", unit="step", leave=False)

    if options.inpainter == "sd":
        inpaint = make_stable_diffusion_inpainter(
            model,
            options.prompt,
            size=options.sd_size,
            steps=options.steps,
            progress=progress,
            generator=torch.Generator().manual_seed(seed),
        )
        return inpaint, inpaint

    # Beside a dish the network inpaints the same dish again. Around a dish there is the table,
    # which the name does not describe: no caption, no guidance.
    inpaint_around = make_model_inpainter(*model, "", options.steps, 1.0, seed, progress)
    if options.image:
        return inpaint_around, inpaint_around
    inpaint_beside = make_model_inpainter(
        *model, name, options.steps, options.guidance, seed, progress
    )
    return inpaint_beside, inpaint_around


# ------------------------------------------------------------------ the command


def main(arguments=None) -> int:
    """Train, generate, animate; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    start = time.perf_counter()
    load_chinese_font(12)       # raises here, rather than after the training, if there is no font
    pipeline = load_pipeline(options.sd, options.sd_config) if options.inpainter == "sd" else None
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    print_plan(options)

    # Networks. A photograph that Stable Diffusion inpaints needs none.
    written = []
    model = None
    if not options.image or options.inpainter == "own":
        model, written = prepare_model(options)
    inpainting_model = model if pipeline is None else pipeline

    # Dishes, uint8 [H, W, 3] each
    if options.image:
        size = options.size if options.inpainter == "own" else options.sd_size
        dishes = [load_photo(options.image, size)]
    else:
        network, encoder, diffusion, autoencoder = model
        dishes = generate_images(
            network,
            encoder,
            diffusion,
            options.names,
            options.size,
            options.steps,
            options.guidance,
            options.seed,
            show_progress=True,
            autoencoder=autoencoder,
        )

    # Images and films
    moves = MOVES if options.move == "all" else [options.move]
    films = {}
    for name, dish in zip(options.names, dishes):
        if options.mask:
            inpaint, _ = make_inpainters(options, inpainting_model, name, "mask")
            dish = inpaint(dish, read_mask(options.mask, options.image, len(dish)))
        written.append(write_image(options, name, dish))
        for move in tqdm(moves, desc=f"films of {name}", unit="film", disable=len(moves) == 1):
            films[name, move] = make_film(options, inpainting_model, name, dish, move)
            written.append(options.out / f"{name}_{move}.{options.format}")
            write_film(written[-1], films[name, move], options.fps)
    written += write_mosaics(options, films, moves)
    for path in written:
        print(f"wrote {path}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def print_plan(options) -> None:
    """Print what will be made, where, and a note for each name that the network cannot know."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU cores"
    names = "、".join(options.names)
    print(f"{names}, {options.move}, on {device}; all files are in {options.out}/", flush=True)
    if options.image:
        return
    for name in options.names:
        try:
            attributes(name)
        except ValueError as error:
            print(f"note: {error} The network was not trained on this name.", flush=True)


def write_image(options, name: str, dish: np.ndarray) -> Path:
    """Write <name>.png, the dish with its name; returns the path."""
    path = options.out / f"{name}.png"
    sheet = contact_sheet([[dish]], [name], columns=1, side=options.show)
    write_atomically(path, encode_png(sheet))
    return path


def make_film(options, model, name: str, dish: np.ndarray, move: str) -> list[np.ndarray]:
    """Make the frames of one camera move over a dish, uint8 [show, show, 3] each."""
    inpaint_beside, inpaint_around = make_inpainters(options, model, name, move)
    return animate(
        dish,
        move,
        inpaint_beside,
        inpaint_around=inpaint_around,
        inpaintings=options.inpaintings,
        seconds=options.seconds,
        fps=options.fps,
        size=(options.show, options.show),
        reverse=options.reverse,
    )


def write_mosaics(options, films: dict, moves) -> list[Path]:
    """Write films that show all moves of a name, and all names of a move; returns their paths.

    films: (name, move) → frames.
    """
    written = []
    side = options.show // 2
    if len(moves) > 1:
        for name in options.names:
            written.append(options.out / f"{name}_all.{options.format}")
            films_of_name = [films[name, move] for move in moves]
            frames = mosaic(films_of_name, list(moves), columns=5, side=side)
            write_film(written[-1], frames, options.fps)
    if len(options.names) > 1:
        for move in moves:
            written.append(options.out / f"all_{move}.{options.format}")
            films_of_move = [films[name, move] for name in options.names]
            frames = mosaic(films_of_move, options.names, side=side)
            write_film(written[-1], frames, options.fps)
    return written


if __name__ == "__main__":
    sys.exit(main())
