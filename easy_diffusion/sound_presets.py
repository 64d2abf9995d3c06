"""Presets for sounds: a text-to-image model learns to hear how a dish is cooked.

    add_audio_encoder       a model of captions becomes one of pairs (sound, caption)
    train_on_sounds         trains the audio encoder; UNet and text encoder keep their weights
    generate_from_sounds    pairs → images

A caption names the ingredients alone, 番茄鸡蛋. The sound says whether they are fried, boiled or
steamed. The UNet was trained on names such as 番茄炒鸡蛋 and stays as it is: the audio encoder
learns token embeddings that the UNet understands.

>>> from .presets import build_networks
>>> from .pretrained import Model
>>> model = add_audio_encoder(Model(*build_networks("番茄鸡蛋炒汤"), autoencoder=None))
>>> sound = torch.from_numpy(cook_sound("汤", seconds=0.5))
>>> generate_from_sounds(model, [(sound, "番茄鸡蛋")], size=32, steps=2).shape
(1, 32, 32, 3)
"""

from pathlib import Path

import numpy as np
import torch

from datasets.dish_sounds import Cooking, cook_sound
from datasets.dishes import attributes

from .generate import generate_images
from .networks.audio_encoder import AudioEncoder, JointEncoder
from .presets import train_demo
from .pretrained import Model
from .training.checkpoint import load_checkpoint, load_ema_weights
from .training.progress import track_progress


def add_audio_encoder(model: Model) -> Model:
    """Return the model with a new audio encoder beside its text encoder; captions become pairs."""
    audio = AudioEncoder(model.encoder.dim).to(model.network.conv_in.weight.device)
    return model._replace(encoder=JointEncoder(audio, model.encoder))


def train_on_sounds(
    model: Model, dishes, minutes: float, batch_size: int | None, checkpoint: Path, **changes
) -> int:
    """Train the audio encoder of a model, or resume its training; returns the number of steps.

    model: of `add_audio_encoder`; it ends with its EMA weights, in eval mode.
    dishes: a dataset of drawn dishes, (image, name). changes: see `train_demo`.
    """
    network, encoder, diffusion, _ = model
    network.requires_grad_(False)
    encoder.second.requires_grad_(False)
    steps = train_demo(
        network, encoder, diffusion, Cooking(dishes), checkpoint, minutes, batch_size, **changes
    )
    for _ in track_progress(steps, description="training the audio encoder"):
        pass
    saved = load_checkpoint(checkpoint)
    load_ema_weights(network, encoder, diffusion, saved)
    network.eval()
    encoder.eval()
    return saved["index"]


def generate_from_sounds(
    model: Model, pairs: list[tuple], size: int, steps: int = 25, **options
) -> np.ndarray:
    """Generate an image for each pair (sound, ingredients) with DDIM: uint8 [B, size, size, 3].

    options: of `generate_images`.
    """
    network, encoder, diffusion, autoencoder = model
    return generate_images(
        network, encoder, diffusion, pairs, size, steps, autoencoder=autoencoder, **options
    )


def hear_dishes(names: list[str], seed: int = 0) -> list[tuple]:
    """The pairs (sound, ingredients) of dishes; each sound has a seed of its own."""
    pairs = []
    for i, name in enumerate(names):
        ingredients, way = attributes(name)
        sound = torch.from_numpy(cook_sound(way, seed=seed + i))
        pairs.append((sound, "".join(ingredients)))
    return pairs
