"""The options of python -m easy_diffusion.demo: --help, defaults, and what is refused.

`parse_options` turns a command line into a namespace. `read_mask` reads the image of --mask, which
the options are checked with, too. demo.py is the command.

>>> options = parse_options(["番茄炒鸡蛋", "清炒土豆", "--size", "64"])
>>> options.names, options.size, options.move
(['番茄炒鸡蛋', '清炒土豆'], 64, 'circle')
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datasets.aipos import load_photo, to_eight_bits
from datasets.dish_films import MOTIONS
from datasets.dish_sounds import SECONDS

from .animation.camera import MOVES
from .animation.film import FORMATS
from .command_line import check_ranges
from .command_setup import check_size
from .diffusion.schedule import NoiseSchedule
from .networks.audio_encoder import load_sound
from .presets import SIZE
from .pretrained import WEIGHTS, find_sizes, find_sound_sizes


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.demo",
        description="Generate the named dishes with trained networks, and write them as animated "
        "images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_image_options(parser)
    add_sampling_options(parser.add_argument_group("sampling and inpainting"))
    add_film_options(parser.add_argument_group("film"))
    options = parser.parse_args(arguments, argparse.Namespace(names=[]))
    check_options(parser, options)
    options.names = options.names or [options.image.stem if options.image else "番茄炒鸡蛋"]
    return options


def add_image_options(parser) -> None:
    """Add the options that choose the dish or the photograph."""
    parser.add_argument(
        "names", nargs="*", metavar="name", default=argparse.SUPPRESS,
        help="Chinese name of a dish, such as 土豆牛肉汤 or 砂锅茄子豆腐 (default: 番茄炒鸡蛋); "
        "several names are also shown side by side in one film",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="FOLDER",
        help="folder for the images and films",
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FOLDER",
        help="folder with the trained networks, such as out/weights of "
        "python -m easy_diffusion.train_demo",
    )
    parser.add_argument(
        "--size", type=int, default=argparse.SUPPRESS,
        help="height and width in pixels of the images that the network generates; the folder must "
        "have a network for that size (default: the largest)",
    )
    parser.add_argument(
        "--sound", type=Path, metavar="FILE",
        help="sound of the cooking, WAV or FLAC, of which two seconds are used; the names are then "
        "those of one or two ingredients, such as 番茄鸡蛋, and the way of cooking is heard",
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE",
        help="photograph to animate instead of a generated dish; its central square is used",
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="image of the same size as --image, white in the region that is inpainted before "
        "the animation",
    )


def add_sampling_options(group) -> None:
    """Add the options of the samplers and of the inpainter."""
    group.add_argument(
        "--steps", type=int, default=25,
        help="number of DDIM steps for a dish, and of noise levels for inpainting, 1 to 1000",
    )
    group.add_argument(
        "--guidance", type=float, default=2.0,
        help="scale of classifier-free guidance; 1 is no guidance",
    )
    group.add_argument(
        "--seed", type=int, default=0,
        help="seed of the initial noise; another seed gives another image of the dish",
    )
    group.add_argument(
        "--inpainter", choices=("own", "control", "sd"), default="own",
        help="network that inpaints: that of --weights (own), the same with a ControlNet, in six "
        "steps (control), or Stable Diffusion (sd)",
    )
    group.add_argument(
        "--controlnet", type=Path, metavar="FILE",
        help="for --inpainter control: a ControlNet for the network of --weights, from "
        "python -m easy_diffusion.train_control --control inpaint",
    )
    group.add_argument(
        "--sd", type=Path, metavar="PATH",
        help="for --inpainter sd: folder or .safetensors file of sd-v1-5-inpainting",
    )
    group.add_argument(
        "--sd-config", type=Path, metavar="FOLDER",
        help="needed if --sd is a file: folder with the JSON files and the tokenizer of the model",
    )
    group.add_argument(
        "--sd-size", type=int, default=512,
        help="height and width in pixels at which Stable Diffusion works, a multiple of 64",
    )
    group.add_argument(
        "--prompt", default="delicious chinese food on a table, seen from above",
        help="prompt for Stable Diffusion",
    )


def add_film_options(group) -> None:
    """Add the options of the camera and of the film's file."""
    group.add_argument(
        "--move", choices=(*MOVES, "all"), default="circle",
        help="camera move; all makes a film of each of the ten moves and one that shows all",
    )
    group.add_argument(
        "--motion", choices=tuple(MOTIONS),
        help="motion of the dish itself, in place of a camera move, for one period of the motion; "
        "--weights must be a folder with a model of films, from python -m "
        "easy_diffusion.train_motion",
    )
    group.add_argument(
        "--reverse", action="store_true",
        help="play the film backwards; centre then zooms out instead of in",
    )
    group.add_argument(
        "--inpaintings", type=int, default=1,
        help="number of times that the camera moves on to a region that must be inpainted; "
        "more of them make the camera's path longer",
    )
    group.add_argument("--seconds", type=float, default=4.0, help="length of the film in seconds")
    group.add_argument(
        "--fps", type=int, default=20,
        help="frames per second; a GIF can represent 10, 20 and 25 exactly",
    )
    group.add_argument("--format", choices=FORMATS, default="gif", help="file format of the film")
    group.add_argument(
        "--show", type=int, default=256,
        help="height and width of the film in pixels; smaller images are enlarged",
    )


def check_options(parser: argparse.ArgumentParser, options) -> None:
    """End the program with a message if options are out of range or contradict each other."""
    # Weights. A photograph that Stable Diffusion inpaints needs none.
    films = options.motion is not None
    if films and options.image:
        parser.error("--motion is for a generated dish, not for a photograph: --image")
    if films and options.inpainter != "own":
        parser.error(f"--motion needs no inpainter: leave out --inpainter {options.inpainter}")
    if options.sound and (films or options.image):
        parser.error("--sound is for a generated dish, without --motion and --image")
    sizes = find_sizes(options.weights, films)
    if options.sound:
        sizes = find_sound_sizes(options.weights)
    if not hasattr(options, "size"):
        options.size = sizes[-1] if sizes else SIZE
    check_size(parser, options.size)
    if options.size not in sizes and (not options.image or options.inpainter != "sd"):
        known = ", ".join(str(size) for size in sizes) or "no"
        kind = "of films " * films + "with an audio encoder " * bool(options.sound)
        command = "train_motion" if films else "train_sound" if options.sound else "train_demo"
        parser.error(
            f"--weights {options.weights} has networks {kind}for {known} pixels, not for --size "
            f"{options.size}: python -m easy_diffusion.{command} trains one"
            f"{'; then add --weights out/sound/weights' * bool(options.sound)}"
            f"{'; then add --weights out/motion/weights' * films}"
        )

    # Numbers
    check_ranges(parser, options, {
        "steps": (1, len(NoiseSchedule.cosine())),      # of its 1000 timesteps
        "guidance": (1, 1000),
        "seed": (0, 2**63 - 1),
        "inpaintings": (1, 100),
        "seconds": (0.1, 600),
        "fps": (1, 1000),
        "show": (16, 8192),
    })
    if options.sd_size < 64 or options.sd_size % 64:
        parser.error(f"--sd-size must be a multiple of 64, not {options.sd_size}")

    # ControlNet
    if (options.inpainter == "control") != (options.controlnet is not None):
        parser.error("--inpainter control and --controlnet FILE must be used together")
    if options.controlnet and not options.controlnet.exists():
        parser.error(f"--controlnet {options.controlnet} does not exist")

    # Stable Diffusion
    wants_sd = options.inpainter == "sd"
    if wants_sd != (options.sd is not None) or (options.sd_config and not options.sd):
        parser.error(
            "--inpainter sd and --sd PATH (folder or .safetensors file of sd-v1-5-inpainting) "
            "must be used together"
        )
    if options.sd and not options.sd.exists():
        parser.error(f"--sd {options.sd} does not exist")

    # Names and photographs
    for name in options.names:
        if not 1 <= len(name) <= 31 or "/" in name:
            parser.error(f"a dish's name has 1 to 31 characters and no slash, not {name!r}")
    if options.mask and not options.image:
        parser.error(f"--mask {options.mask} needs a photograph: --image")
    if options.image:
        check_photo(parser, options)
    if options.sound:
        if not options.names:
            parser.error("--sound needs the names of ingredients, such as 番茄鸡蛋")
        try:
            options.waveform = load_sound(options.sound, SECONDS)
        except (OSError, ValueError) as error:
            parser.error(f"--sound: {error}")


def check_photo(parser: argparse.ArgumentParser, options) -> None:
    """End the program with a message if --image or --mask cannot be used."""
    if options.names:
        names = "、".join(options.names)
        parser.error(f"use either --image {options.image} or names of dishes ({names}), not both")
    try:
        load_photo(options.image, options.size)
        if options.mask:
            read_mask(options.mask, options.image, options.size)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def read_mask(path, photo_path, size: int) -> np.ndarray:
    """Read the mask of a photograph, cropped and scaled like the photograph: bool [size, size].

    path: image file, white where the photograph is to be inpainted; transparent pixels are black.
        A mask of 0 and one other value is read as one of black and white.
    photo_path: the photograph. Both are turned upright first, as their EXIF data says.
    Raises ValueError if the two differ in width or height, or if the mask selects nothing.
    """
    with Image.open(path) as mask_file, Image.open(photo_path) as photo_file:
        mask = ImageOps.exif_transpose(mask_file)
        photo = ImageOps.exif_transpose(photo_file)
        if mask.size != photo.size:
            mask_size = f"{mask.size[0]}×{mask.size[1]}"
            photo_size = f"{photo.size[0]}×{photo.size[1]}"
            raise ValueError(f"the mask {path} is {mask_size}, the image {photo_path} {photo_size}")
        if "A" in mask.getbands() or "transparency" in mask.info:
            black = Image.new("RGBA", mask.size, "black")
            mask = Image.alpha_composite(black, mask.convert("RGBA"))
        mask = to_eight_bits(mask).convert("L")
        levels = np.unique(mask)
        if len(levels) == 2 and levels[0] == 0:     # of 0 and 1, or black and a dark colour
            mask = mask.point(lambda level: 255 if level else 0)
        mask = np.asarray(ImageOps.fit(mask, (size, size), Image.Resampling.BILINEAR)) > 127
    if not mask.any():
        raise ValueError(
            f"the mask {path} selects nothing to inpaint: its grey levels are from {levels[0]} to "
            f"{levels[-1]}, and those above 127 select, or 1 in a mask of 0 and 1"
        )
    return mask
