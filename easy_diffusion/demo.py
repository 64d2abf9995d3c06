"""From a dish's name to a moving picture, by one command: python -m easy_diffusion.demo 番茄炒鸡蛋 --move right

The first run draws dishes into a store, trains a network on them from scratch and remembers it; a later run, or one after
a crash, goes on from there. Then it samples the dish, repaints what the camera's move uncovers, and writes into `out/`:

    <name>_<move>.gif      the dish, moving (or .mp4, .webp: --format)
    <name>.png             the dish
    <name>_all.gif         with --move all: all ten moves side by side;  all_<move>.gif: several names side by side
    held_out_64.png        held-out dishes, sampled (left) beside a real drawing (right): combinations it never saw
    loss_64.png            the loss of the training
    autoencoder_128.png    with --latent: held-out dishes, and what the autoencoder gives back

With --latent the network learns in the space of an autoencoder, which is trained first, on the same dishes: pictures of twice the side
at the same cost. Each dish is encoded once, and its latent kept. With --image a photograph is moved over instead of a dish that was drawn,
with --mask a part of it is repainted first, and with --inpainter sd Stable Diffusion paints what is new.

This file is the roof of the house: it imports from everywhere, and nothing imports it. What it cooks by is recipe.py.

>>> draw_curve([0.5, 0.4, 0.3])[1:4]
b'PNG'
"""

import argparse
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
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from datasets.aipos import load_photo
from datasets.dishes import attributes, dish_names, draw_dish

from .animation.camera import MOVES
from .animation.film import FORMATS, animate, mosaic, write_film
from .diffusion.schedule import NoiseSchedule
from .files import write_atomically
from .generate import generate_images, make_model_inpainter
from .images import contact_sheet, encode_png, load_chinese_font
from .inpainting.stable_diffusion_inpainter import load_pipeline, make_stable_diffusion_inpainter
from .presets import BATCH, DISHES, SIZE, build_networks, prepare_dishes, prepare_latents, train_or_load
from .training.data_loader import derive_seed


def make_held_out_sheet(network, encoder, diffusion, size: int, guidance: float, autoencoder=None, count: int = 12):
    """Held-out dishes, each as sampled and as drawn."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    sampled = generate_images(network, encoder, diffusion, names, size, guidance=guidance, show_progress=True, autoencoder=autoencoder)
    real = [draw_dish(name, size, seed=1).transpose(1, 2, 0) for name in names]
    return contact_sheet([list(pair) for pair in zip(sampled, real)], names, columns=3)


def plot_loss(losses: list[float]) -> bytes:
    """A PNG of the loss of each step and its mean over 100 steps, or fewer of a short training."""
    window = min(100, len(losses))
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(losses, color="lightgrey", linewidth=0.5, label="each step")
    axes.plot(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"), label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"training, {len(losses)} steps")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()


def read_mask(path, of, size: int) -> np.ndarray:
    """A mask from a picture, white = repaint, for the photograph `of` it, cut and scaled as that is: bool [size, size]. What of the mask
    can be looked through is black. ValueError where the two are not equally large."""
    with Image.open(path) as mask, Image.open(of) as picture:
        mask, picture = (ImageOps.exif_transpose(image) for image in (mask, picture))                       # upright
        if mask.size != picture.size:
            raise ValueError(f"the mask {path} is {mask.size[0]}×{mask.size[1]}, the picture {of} {picture.size[0]}×{picture.size[1]}")
        if "A" in mask.getbands() or "transparency" in mask.info:
            mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
        return np.asarray(ImageOps.fit(mask.convert("L"), (size, size), Image.Resampling.BILINEAR)) > 127


def parse_options(arguments) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m easy_diffusion.demo", description=main.__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    minutes = 2.5 if torch.cuda.is_available() else 10.0
    parser.add_argument("names", nargs="*", metavar="name", default=argparse.SUPPRESS, help="the Chinese name of "
                        "a dish, such as 土豆牛肉汤 or 砂锅茄子豆腐 (default: 番茄炒鸡蛋); several names also make a mosaic")
    parser.add_argument("--move", choices=(*MOVES, "all"), default="circle", help="the camera's move, or all ten, and a sheet of them")
    parser.add_argument("--reverse", action="store_true", help="the film backwards: centre then goes out of the picture, not into it")
    parser.add_argument("--out", type=Path, default=Path("out"),
                        help="the folder of the pictures, the drawn dishes and the checkpoint")
    parser.add_argument("--minutes", type=float, default=minutes, help="of training; a finished training is not repeated")
    parser.add_argument("--dishes", type=int, default=DISHES, help="drawn for the training")
    parser.add_argument("--size", type=int, default=argparse.SUPPRESS, help="side of the pictures that the network learns, a multiple of 8 "
                        f"(default: {SIZE}, or {2 * SIZE} with --latent)")
    parser.add_argument("--latent", action="store_true", help="train an autoencoder first, as long again, and the network in its space")
    parser.add_argument("--image", type=Path, help="a photograph to move over, instead of a dish that the network draws")
    parser.add_argument("--mask", type=Path, help="a picture as large as --image, white where that is to be repainted first")
    parser.add_argument("--inpainter", choices=("own", "sd"), default="own", help="who paints what is new: the network, or Stable Diffusion")
    parser.add_argument("--sd", type=Path, metavar="PATH", help="for --inpainter sd: the folder, or .safetensors file, of sd-v1-5-inpainting")
    parser.add_argument("--sd-config", type=Path, metavar="FOLDER", help="for a file: a folder with the model's JSON files and tokenizer")
    parser.add_argument("--sd-size", type=int, default=512, help="side of the pictures that it works on, a multiple of 64")
    parser.add_argument("--prompt", default="delicious chinese food on a table, seen from above", help="what Stable Diffusion is told")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM for a sample, and noise levels of a repaint")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance; 1 is none")
    parser.add_argument("--inpaintings", type=int, default=1, help="how often the camera moves on to something unpainted")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the film")
    parser.add_argument("--fps", type=int, default=20, help="frames a second; 10, 20 and 25 are exact in a GIF")
    parser.add_argument("--format", choices=FORMATS, default="gif", help="of the film")
    parser.add_argument("--show", type=int, default=256, help="side of the film in pixels; small pictures are enlarged")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that becomes the dish: another seed, another picture")
    options = parser.parse_args(arguments, argparse.Namespace(names=[]))
    options.size = getattr(options, "size", 2 * SIZE if options.latent else SIZE)
    if options.size % 8 or not 32 <= options.size <= 512:
        parser.error(f"--size is a multiple of 8 from 32 to 512, not {options.size}")
    for option, least in (("minutes", 1e-3), ("dishes", BATCH), ("steps", 1), ("inpaintings", 1), ("seconds", 0.1), ("fps", 1), ("show", 16)):
        if getattr(options, option) < least:
            parser.error(f"--{option} is {least} or more, not {getattr(options, option)}")
    if options.steps > len(NoiseSchedule.cosine()):
        parser.error(f"--steps is at most 1000, the timesteps of the schedule, not {options.steps}")
    for name in options.names:
        if not 1 <= len(name) <= 31 or "/" in name:
            parser.error(f"a dish's name has 1 to 31 characters and no slash, not {name!r}")
    if options.guidance < 1:
        parser.error(f"--guidance is 1 or more, not {options.guidance}")
    if (options.inpainter == "sd") != (options.sd is not None) or (options.sd_config and not options.sd):
        parser.error("--inpainter sd and --sd PATH, the folder or .safetensors file of sd-v1-5-inpainting, go together")
    if options.sd and not options.sd.exists():
        parser.error(f"no Stable Diffusion at {options.sd}")
    if options.sd_size < 64 or options.sd_size % 64:
        parser.error(f"--sd-size is a multiple of 64, not {options.sd_size}")
    if options.mask and not options.image:
        parser.error(f"--mask {options.mask} is for a photograph: --image")
    if options.image:
        if options.names:
            parser.error(f"either --image {options.image} or names of dishes, not both: {'、'.join(options.names)}")
        try:
            load_photo(options.image, options.size)
            if options.mask:
                read_mask(options.mask, options.image, options.size)
        except (OSError, ValueError) as wrong:
            parser.error(str(wrong))
    options.names = options.names or [options.image.stem if options.image else "番茄炒鸡蛋"]
    return options


def main(arguments=None) -> int:
    """Draw, train, sample, animate; see the module's docstring."""
    options, start = parse_options(arguments), time.perf_counter()
    load_chinese_font(12)                                                        # without one it would fail at the end
    artist = None                                                           # who paints: Stable Diffusion's pipeline, or the demo's model
    if options.inpainter == "sd":
        artist = load_pipeline(options.sd, options.sd_config)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    moves, written = MOVES if options.move == "all" else [options.move], []
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    print(f"{'、'.join(options.names)}, {options.move}, on {where}; everything goes to {options.out}/", flush=True)
    if not options.image:
        for name in options.names:
            try:
                attributes(name)
            except ValueError as unknown:
                print(f"note: {unknown} The network has not learned this one; it will do what it can.", flush=True)
    if not options.image or options.inpainter == "own":
        model, pictures = prepare_model(options)
        artist, written = artist or model, [*written, *pictures]

    if options.image:
        dishes = [load_photo(options.image, options.size if options.inpainter == "own" else options.sd_size)]
    else:
        network, encoder, diffusion, autoencoder = model
        dishes = generate_images(network, encoder, diffusion, options.names, options.size, options.steps, options.guidance, options.seed, show_progress=True,
                        autoencoder=autoencoder)
    films = {}
    for name, dish in zip(options.names, dishes):
        if options.mask:
            dish = make_inpainters(options, artist, name, "mask")[0](dish, read_mask(options.mask, options.image, len(dish)))
        written.append(options.out / f"{name}.png")
        write_atomically(written[-1], encode_png(contact_sheet([[dish]], [name], columns=1, side=options.show)))
        for move in tqdm(moves, desc=f"films of {name}", unit="film", disable=len(moves) == 1):
            beside, around = make_inpainters(options, artist, name, move)
            films[name, move] = animate(dish, move, beside, inpaint_around=around, inpaintings=options.inpaintings, seconds=options.seconds,
                                        fps=options.fps, size=(options.show, options.show), reverse=options.reverse)
            written.append(options.out / f"{name}_{move}.{options.format}")
            write_film(written[-1], films[name, move], options.fps)
    for name in options.names if len(moves) > 1 else ():
        written.append(options.out / f"{name}_all.{options.format}")
        write_film(written[-1], mosaic([films[name, move] for move in moves], list(moves), columns=5, side=options.show // 2), options.fps)
    for move in moves if len(options.names) > 1 else ():
        written.append(options.out / f"all_{move}.{options.format}")
        write_film(written[-1], mosaic([films[name, move] for name in options.names], options.names, side=options.show // 2), options.fps)
    for path in written:
        print(f"wrote {path}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def make_inpainters(options, artist, name: str, move: str) -> tuple:
    """Painters of what lies beside the dish, and around it; of one seed the same for this move, whatever else is filmed."""
    seed = derive_seed(options.seed, move)

    def progress(walk):
        return tqdm(walk, desc=f"{name}, {move}: repainting", unit="step", leave=False)

    if options.inpainter == "sd":
        paint = make_stable_diffusion_inpainter(artist, options.prompt, size=options.sd_size, steps=options.steps, progress=progress,
                                         generator=torch.Generator().manual_seed(seed))
        return paint, paint
    # Beside a dish lies another helping of it; around it there is a table, of which its name says nothing.
    around = make_model_inpainter(*artist, "", options.steps, 1.0, seed, progress)
    return around if options.image else make_model_inpainter(*artist, name, options.steps, options.guidance, seed, progress), around


def prepare_model(options) -> tuple[tuple, list[Path]]:
    """(network, encoder, diffusion, autoencoder or None) of the demo, trained, and the paths of the pictures that tell how well."""
    store, autoencoder, suffix = prepare_dishes(options.out / f"dishes_{options.size}", options.dishes, options.size), None, f"{options.size}"
    if options.latent:
        store, autoencoder = prepare_latents(store, options.out, options.size, options.minutes)
        suffix += "_latent"
    torch.manual_seed(0)                                                    # whatever was there already, the network begins the same
    network, encoder, diffusion = build_networks("".join(dish_names("train")), autoencoder)
    weights = sum(parameter.numel() for parameter in itertools.chain(network.parameters(), encoder.parameters()))
    print(f"{weights / 1e6:.1f} M weights, for {'latents' if options.latent else 'pictures'} {list(store[0][0].shape)}", flush=True)
    file = options.out / f"model_{suffix}.safetensors"
    losses = train_or_load(network, encoder, diffusion, store, file, options.minutes)
    sheet, curve = options.out / f"held_out_{suffix}.png", options.out / f"loss_{suffix}.png"
    if not curve.exists() or curve.stat().st_mtime < file.stat().st_mtime:
        write_atomically(curve, plot_loss(losses))
    if not sheet.exists() or sheet.stat().st_mtime < file.stat().st_mtime:
        write_atomically(sheet, encode_png(make_held_out_sheet(network, encoder, diffusion, options.size, options.guidance, autoencoder)))
    return (network, encoder, diffusion, autoencoder), [sheet, curve]


if __name__ == "__main__":
    sys.exit(main())
