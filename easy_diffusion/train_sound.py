"""Train an audio encoder on sounds of cooking: python -m easy_diffusion.train_sound

The text-to-image model in --weights keeps its weights. An audio encoder learns to tell it how a
dish is cooked, from sounds that are synthesised (datasets/dish_sounds.py); the caption names the
ingredients alone. The same command resumes an interrupted training. The files in --out are

    weights/                        the model, and audio_encoder_64.safetensors
    sounds/                         a sound of each way of cooking as a WAV file, for the demo's
                                    --sound; none of them is trained with
    heard_64.png                    held-out pairs of ingredients, each with every one of these
                                    sounds: generated (left) and drawn (right)
    training_sounds_64.safetensors  the checkpoint of the training

>>> options = parse_options(["--minutes", "3"])
>>> options.minutes, options.size
(3.0, 64)
"""

import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from datasets.dish_scene import WAYS
from datasets.dish_sounds import SAMPLE_RATE, Cooking, cook_sound
from datasets.dishes import HELD_OUT_PAIRS, draw_dish

from .command_line import RESUMES, run_command
from .command_setup import add_training_options, check_training_options, prepare_command
from .condition_presets import add_audio_encoder, train_condition
from .files import atomic_path, write_atomically
from .generate import generate_images
from .images import contact_sheet, encode_png
from .presets import DISHES, default_batch_size, prepare_dishes
from .pretrained import Model, load_pixel_model, save_audio_encoder, save_model

SHOWN = 3                       # held-out pairs on the sheet
SEED = 10 ** 9                  # of the sounds that are shown, larger than those of the training


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.train_sound",
        description="Train an audio encoder for a text-to-image model on sounds of cooking.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dishes", type=int, default=DISHES,
        help="number of drawn dishes to train on; they are drawn first",
    )
    add_training_options(
        parser,
        minutes=2.0 if torch.cuda.is_available() else 8.0,
        batch_size=default_batch_size(latent=False),
        out="out/sound",
        items="dishes",
    )
    options = parser.parse_args(arguments)
    check_training_options(parser, options, dishes=(options.batch_size, math.inf))
    return options


def main(arguments=None) -> int:
    """Train an audio encoder; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    model = load_pixel_model(options.weights, options.size)
    dishes = prepare_dishes(options.out / f"dishes_{options.size}", options.dishes, options.size)
    torch.manual_seed(0)
    model = add_audio_encoder(model)
    checkpoint = options.out / f"training_sounds_{options.size}.safetensors"
    steps = train_condition(
        model, Cooking(dishes), options.minutes, options.batch_size, checkpoint
    )
    weights = options.out / "weights"
    save_model(weights, options.size, model._replace(encoder=model.encoder.second))
    save_audio_encoder(weights, options.size, model, {"steps": steps})
    sheet = options.out / f"heard_{options.size}.png"
    sounds = {way: cook_sound(way, seed=SEED) for way in WAYS}
    write_sheet(sheet, model, options.size, sounds)
    write_sounds(options.out / "sounds", sounds)
    for written in (weights, sheet, options.out / "sounds"):
        print(f"wrote {written}")
    return 0


def write_sheet(path: Path, model: Model, size: int, sounds: dict[str, np.ndarray]) -> None:
    """Write held-out dishes that were heard, beside drawn ones: a row for each way of cooking."""
    pairs = random.Random(0).sample(sorted(HELD_OUT_PAIRS), SHOWN)
    names = [way.name_with_two.format(*pair) for way in WAYS.values() for pair in pairs]
    captions = [
        (torch.from_numpy(sound), "".join(pair)) for sound in sounds.values() for pair in pairs
    ]
    network, encoder, diffusion, _ = model
    images = generate_images(network, encoder, diffusion, captions, size, show_progress=True)
    drawn = [draw_dish(name, size, seed=1).transpose(1, 2, 0) for name in names]
    cells = [list(pair) for pair in zip(images, drawn)]
    write_atomically(path, encode_png(contact_sheet(cells, names, columns=SHOWN)))


def write_sounds(folder: Path, sounds: dict[str, np.ndarray]) -> None:
    """Write the sound of each way of cooking as a WAV file."""
    folder.mkdir(exist_ok=True)
    for way, sound in sounds.items():
        with atomic_path(folder / f"{way}.wav") as temporary:
            soundfile.write(temporary, sound, SAMPLE_RATE, format="WAV")


if __name__ == "__main__":
    sys.exit(run_command(main, RESUMES))
