"""Train a ControlNet on drawn dishes: python -m easy_diffusion.train_control --control parts

The text-to-image model in --weights is frozen. The ControlNet learns to steer it with a control
image: where the parts of a dish are, how high its surface is, its edges, or a coarse sketch; see
datasets/dish_controls.py. With --control inpaint it learns to inpaint what a camera move uncovers;
see inpainting/control_inpainter.py. A caption is dropped in half of the examples, so that the
control has to say as much as it can. The same command resumes an interrupted training. The files in
--out are

    controlnet_parts_64.safetensors   the trained ControlNet, for networks/controlnet.py
    controlled_parts_64.png           held-out dishes: the control, a sample with it, a sample
                                      without it from the same noise, and the drawn dish
    training_parts_64.safetensors     the checkpoint of the training

>>> options = parse_options(["--control", "edges", "--minutes", "3"])
>>> options.control, options.minutes, options.size
('edges', 3.0, 64)
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

from datasets.dish_controls import CHANNELS, ControlledDishes

from .command_line import RESUMES, run_command
from .command_setup import add_training_options, check_training_options, prepare_command
from .files import write_atomically
from .generate import generate_images
from .images import contact_sheet, encode_png
from .inpainting.control_inpainter import CONTROL_CHANNELS
from .masked_dishes import MaskedDishes
from .networks.controlnet import (
    Control,
    Controlled,
    ControlNet,
    ControlTraining,
    save_controlnet,
)
from .presets import DISHES, default_batch_size, train_demo
from .pretrained import Model, load_pixel_model
from .training.checkpoint import load_checkpoint, load_ema_weights
from .training.progress import track_progress

INPAINT = "inpaint"
CAPTION_DROPOUT = 0.5
SHOWN = 8                       # held-out dishes on the sheet


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.train_control",
        description="Train a ControlNet for a text-to-image model on drawn dishes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--control", choices=[*CHANNELS, INPAINT], default="parts",
        help="what the control image shows",
    )
    parser.add_argument(
        "--dishes", type=int, default=DISHES, help="number of drawn dishes to train on"
    )
    add_training_options(
        parser,
        minutes=2.0 if torch.cuda.is_available() else 8.0,
        batch_size=default_batch_size(latent=False),
        out="out/control",
        items="images",
    )
    options = parser.parse_args(arguments)
    check_training_options(parser, options, dishes=(options.batch_size, math.inf))
    return options


def main(arguments=None) -> int:
    """Train a ControlNet; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    model = load_pixel_model(options.weights, options.size)
    name = f"{options.control}_{options.size}"
    controlnet = train_controlnet(options, model, options.out / f"training_{name}.safetensors")
    path = options.out / f"controlnet_{name}.safetensors"
    save_controlnet(path, controlnet, model.network, options.control)
    sheet = options.out / f"controlled_{name}.png"
    write_sheet(sheet, model, controlnet, options.control, options.size)
    for written in (path, sheet):
        print(f"wrote {written}")
    return 0


def train_controlnet(options, model: Model, checkpoint: Path) -> ControlNet:
    """Train a ControlNet for the model's UNet, or resume its training; returns its EMA weights."""
    torch.manual_seed(0)
    channels = CONTROL_CHANNELS if options.control == INPAINT else CHANNELS[options.control]
    controlnet = ControlNet.from_unet(model.network, channels)
    network = ControlTraining(model.network, controlnet)
    dataset = make_dataset(options.control, options.dishes, options.size)
    steps = train_demo(
        network,
        model.encoder.requires_grad_(False),
        model.diffusion,
        dataset,
        checkpoint,
        options.minutes,
        options.batch_size,
        caption_dropout=CAPTION_DROPOUT,
    )
    for _ in track_progress(steps, description=f"training the ControlNet of {options.control}"):
        pass
    load_ema_weights(network, model.encoder, model.diffusion, load_checkpoint(checkpoint))
    return controlnet.eval()


def make_dataset(kind: str, length: int, size: int, split: str = "train", seed: int = 0):
    """The dataset of drawn dishes with controls of a kind, one of --control."""
    if kind == INPAINT:
        return MaskedDishes(length, size, split, seed)
    return ControlledDishes(length, size, kind, split, seed)


def write_sheet(path: Path, model: Model, controlnet: ControlNet, kind: str, size: int) -> None:
    """Write held-out dishes: control, sample with it, sample without it, and the drawn dish."""
    dataset = make_dataset(kind, SHOWN, size, split="held_out", seed=1)
    images, names, extras = zip(*(dataset[i] for i in range(SHOWN)))
    controls = torch.stack([extra["control"] for extra in extras])
    unet, encoder, diffusion, _ = model
    device = unet.conv_in.weight.device
    controlled = Controlled(unet, [Control(controlnet, controls.to(device) / 255)])
    rows = [
        [show_control(control, kind) for control in controls],
        generate_images(controlled, encoder, diffusion, list(names), size),
        generate_images(unet, encoder, diffusion, list(names), size),
        [image.permute(1, 2, 0).numpy() for image in images],
    ]
    cells = [list(column) for column in zip(*rows)]
    write_atomically(path, encode_png(contact_sheet(cells, list(names), columns=2, side=size)))


def show_control(control: torch.Tensor, kind: str) -> np.ndarray:
    """A control uint8 [C, H, W] as an image uint8 [H, W, 3]; each part has a colour of its own."""
    if kind == INPAINT:
        return control[:3].permute(1, 2, 0).numpy()
    if kind != "parts":
        return control[0].numpy()[..., None].repeat(3, axis=2)
    colours = np.array([[0.3, 0.3, 0.3], [0.9, 0.9, 0.9], [0.9, 0.4, 0.2], [0.2, 0.6, 0.3]])
    return np.einsum("chw,cd->hwd", control.numpy(), colours).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(run_command(main, RESUMES))
