"""From the name of a dish to an animated image.

    python -m easy_diffusion.demo 番茄炒鸡蛋 --move right

It uses the trained networks in weights/ or, with --weights, those of another folder. The network
generates the dish and inpaints what the camera's move uncovers. The files in --out are

    <name>_<move>.gif      the animated dish (or .mp4, .webp: --format)
    <name>.png             the dish
    <name>_all.gif         with --move all: all ten moves side by side
    all_<move>.gif         with several names: all of them side by side
    held_out_128.png       held-out dishes, generated (left) and drawn (right): combinations of
                           ingredients that the training data does not contain

With --motion the dish itself moves, in a film that a model of films generates; it comes from
python -m easy_diffusion.train_motion. The file is <name>_<motion>.gif.

With --sound the way of cooking is heard instead of named: --sound wok.wav 番茄鸡蛋. The audio
encoder comes from python -m easy_diffusion.train_sound.

With --image the camera moves over a photograph instead of a generated dish, and --mask selects a
region of it to inpaint first. With --inpainter control a ControlNet helps the network to inpaint in
six steps; with --inpainter sd Stable Diffusion inpaints. The options are in demo_options.py.
train_demo.py trains the networks.

>>> from .presets import build_networks
>>> from .pretrained import Model
>>> model = Model(*build_networks("番茄汤"), autoencoder=None)       # random weights
>>> options = parse_options(["番茄汤", "--size", "64", "--steps", "2", "--seconds", "1"])
>>> dish = np.zeros((64, 64, 3), np.uint8)
>>> frames = make_film(options, model, "番茄汤", dish, "right")
>>> frames[0].shape
(256, 256, 3)
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from datasets.aipos import load_photo
from datasets.dish_films import FPS, FRAMES, MOTIONS
from datasets.dishes import attributes, ingredient_names

from .animation.camera import MOVES
from .animation.film import animate, mosaic, write_film
from .command_line import run_command
from .command_setup import prepare_command
from .demo_options import parse_options, read_mask
from .files import write_atomically
from .film_presets import generate_films
from .generate import generate_images, make_held_out_sheet, make_model_inpainter
from .images import contact_sheet, encode_png
from .inpainting.control_inpainter import make_control_inpainter
from .inpainting.stable_diffusion_inpainter import make_stable_diffusion_inpainter
from .inpainting.stable_diffusion_pipeline import load_pipeline
from .networks.controlnet import load_controlnet
from .pretrained import load_model, load_sound_model, read_training
from .training.data_loader import derive_seed


def make_caption(options, name: str):
    """The caption of a name: the name itself or, with --sound, a pair (sound, name)."""
    return (options.waveform, name) if options.sound else name


def make_inpainters(options, model, name: str, move: str) -> tuple:
    """Make two inpainters: for what lies beside the dish, and for what lies around it.

    model: Stable Diffusion's pipeline with --inpainter sd; otherwise a Model of pretrained.py, with
        --inpainter control in a pair (Model, ControlNet).
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

    def make_inpainter(caption, guidance):
        if options.inpainter == "own":
            return make_model_inpainter(*model, caption, options.steps, guidance, seed, progress)
        (network, encoder, diffusion, _), controlnet = model
        return make_control_inpainter(
            network, controlnet, encoder, diffusion, caption, guidance=guidance,
            generator=torch.Generator().manual_seed(seed), progress=progress,
        )

    # Beside a dish the network inpaints the same dish again. Around a dish there is the table,
    # which the name does not describe: no caption, no guidance.
    encoder = (model[0] if options.inpainter == "control" else model).encoder
    inpaint_around = make_inpainter(encoder.uncond, 1.0)
    if options.image:
        return inpaint_around, inpaint_around
    return make_inpainter(make_caption(options, name), options.guidance), inpaint_around


# ------------------------------------------------------------------ the command


def main(arguments=None) -> int:
    """Generate, animate; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    start = time.perf_counter()
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    print_plan(options)
    if options.motion:
        for path in write_motion_films(options):
            print(f"wrote {path}")
        return 0
    model, inpainting_model = load_networks(options)
    written = []

    # Dishes, uint8 [H, W, 3] each
    if options.image:
        size = options.sd_size if options.inpainter == "sd" else options.size
        dishes = [load_photo(options.image, size)]
    else:
        network, encoder, diffusion, autoencoder = model
        dishes = generate_images(
            network,
            encoder,
            diffusion,
            [make_caption(options, name) for name in options.names],
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
    if not options.image and not options.sound:
        written.append(write_held_out_sheet(options, model))
    for path in written:
        print(f"wrote {path}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def load_networks(options) -> tuple:
    """Load (what generates, what inpaints), for `generate_images` and `make_inpainters`.

    A photograph that Stable Diffusion inpaints needs no model: the first is None.
    """
    if options.inpainter == "sd":
        pipeline = load_pipeline(options.sd, options.sd_config)
        return (None if options.image else load_text_model(options)), pipeline
    model = load_text_model(options)
    if options.inpainter == "own":
        return model, model
    if model.autoencoder is not None:
        raise ValueError(
            f"the network of {options.size} pixels works on latents; --inpainter control needs "
            "one that works on pixels, such as that of --size 64"
        )
    controlnet, kind = load_controlnet(options.controlnet, model.network)
    if kind != "inpaint":
        raise ValueError(
            f"{options.controlnet} was trained with --control {kind}; "
            "--inpainter control needs one of --control inpaint"
        )
    return model, (model, controlnet)


def load_text_model(options):
    """Load the model of --weights, which with --sound takes pairs (sound, name)."""
    load = load_sound_model if options.sound else load_model
    return load(options.weights, options.size)


def print_plan(options) -> None:
    """Print what will be made, where, and a note for each name that the network cannot know."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU cores"
    names = "、".join(options.names)
    kind = options.motion or options.move
    print(f"{names}, {kind}, on {device}; all files are in {options.out}/", flush=True)
    if options.image:
        return
    if options.sound:
        for name in set(options.names) - ingredient_names():
            print(f"note: {name} should be the names of one or two ingredients, such as 番茄鸡蛋; "
                  "the way of cooking is heard", flush=True)
        return
    for name in options.names:
        try:
            attributes(name)
        except ValueError as error:
            print(f"note: {error} The network was not trained on this name.", flush=True)


def write_motion_films(options) -> list[Path]:
    """Generate a film of each dish in which it moves, and write it; returns the paths."""
    model = load_model(options.weights, options.size, films=True)
    frames = read_training(options.weights, options.size, films=True).get("frames", FRAMES)
    written = []
    for number, name in enumerate(tqdm(options.names, desc="films", unit="film")):
        film, = generate_films(
            model,
            [MOTIONS[options.motion] + name],
            frames,
            size=options.size,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed + number,
        )
        written.append(options.out / f"{name}_{options.motion}.{options.format}")
        frames = mosaic([list(film)], [name], columns=1, side=options.show)
        write_film(written[-1], frames, FPS)
    return written


def write_image(options, name: str, dish: np.ndarray) -> Path:
    """Write <name>.png, the dish with its name; returns the path."""
    path = options.out / f"{name}.png"
    sheet = contact_sheet([[dish]], [name], columns=1, side=options.show)
    write_atomically(path, encode_png(sheet))
    return path


def write_held_out_sheet(options, model) -> Path:
    """Write held_out_<size>.png, held-out dishes as generated and as drawn; returns the path."""
    path = options.out / f"held_out_{options.size}.png"
    sheet = make_held_out_sheet([model], options.size, options.guidance)
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
    sys.exit(run_command(main, "interrupted; the files that are already in --out are complete"))
