"""Presets for other conditions than captions: sounds, spoken names, reference images, beats.

A condition is whatever gives a context and a mask. Each function takes a trained model, and returns
it with a new, untrained encoder. What its captions become:

    add_audio_encoder       (sound, ingredients): how the dish is cooked is heard
    hear_names              the sound of a spoken name
    add_image_prompt        (reference image, ingredients): "this table and this plate, that dish"
    add_beats               (name of a film, beats), for a model of films

All but `add_beats` freeze the given model, in place; `train_condition` trains what is new. The UNet
was trained on names such as 番茄炒鸡蛋; a new encoder learns token embeddings that it understands.

>>> from .generate import generate_images
>>> from .presets import build_networks
>>> model = Model(*build_networks("番茄鸡蛋炒汤"), autoencoder=None)       # random weights
>>> network, encoder, diffusion, _ = add_audio_encoder(model)
>>> pairs = hear_dishes(["番茄炒鸡蛋"])
>>> generate_images(network, encoder, diffusion, pairs, size=32, steps=2).shape
(1, 32, 32, 3)
"""

from pathlib import Path

import torch

from datasets.dish_sounds import cook_sound
from datasets.dishes import attributes

from .networks.audio_encoder import AudioEncoder
from .networks.image_prompt import ImageEncoder, ImagePromptUNet
from .networks.joint_encoder import BeatEncoder, JointEncoder
from .presets import train_or_load
from .pretrained import Model
from .training.checkpoint import load_checkpoint


def add_audio_encoder(model: Model) -> Model:
    """Add an audio encoder beside the text encoder: captions become (sound, ingredients)."""
    freeze(model)
    return model._replace(encoder=JointEncoder(make_audio_encoder(model), model.encoder))


def hear_names(model: Model) -> Model:
    """Put an audio encoder in place of the text encoder: captions become sounds."""
    freeze(model)
    return model._replace(encoder=make_audio_encoder(model))


def make_audio_encoder(model: Model) -> AudioEncoder:
    """A new audio encoder for the network of a model."""
    return AudioEncoder(model.encoder.dim).to(model.network.conv_in.weight.device)


def add_image_prompt(model: Model) -> Model:
    """Add an adapter for images to the UNet: captions become (reference image, ingredients)."""
    freeze(model)
    images = ImageEncoder(model.encoder.dim).to(model.network.conv_in.weight.device)
    network = ImagePromptUNet.from_unet(model.network, images.tokens).requires_grad_(False)
    for parameter in network.adapter_parameters():
        parameter.requires_grad_(True)
    return model._replace(network=network, encoder=JointEncoder(images, model.encoder))


def add_beats(model: Model) -> Model:
    """Add beats to a model of films: captions become (name, beats). All of it is trained."""
    encoder = BeatEncoder(model.encoder).to(model.network.conv_in.weight.device)
    return model._replace(encoder=encoder)


def freeze(model: Model) -> None:
    """Keep the weights of a model as they are in the training that follows."""
    model.network.requires_grad_(False)
    model.encoder.requires_grad_(False)


def train_condition(
    model: Model, dataset, minutes: float, batch_size: int | None, checkpoint: Path, **changes
) -> int:
    """Train what is not frozen of a model, or resume its training; returns the number of steps.

    model: it ends with its EMA weights, in eval mode.
    dataset: items are (image or film, caption as the encoder takes it). changes: see `train_demo`.

    Raises ValueError for a checkpoint of a training in which other weights were frozen.
    """
    network, encoder, diffusion, _ = model
    if checkpoint.exists():
        check_frozen(model, checkpoint)
    losses = train_or_load(
        network, encoder, diffusion, dataset, checkpoint, minutes, batch_size=batch_size, **changes
    )
    network.eval()
    encoder.eval()
    return len(losses)


def check_frozen(model: Model, checkpoint: Path) -> None:
    """Raise ValueError unless the frozen weights of a model are those of the checkpoint."""
    saved = load_checkpoint(checkpoint)["models"]
    parts = torch.nn.ModuleDict({"network": model.network, "encoder": model.encoder})
    for name, weight in parts.named_parameters():
        if weight.requires_grad or name not in saved:
            continue
        if not torch.equal(saved[name], weight.cpu()):
            raise ValueError(
                f"{checkpoint} belongs to a training with other --weights; give another --out"
            )


def hear_dishes(names: list[str], seed: int = 0) -> list[tuple]:
    """The pairs (sound, ingredients) of dishes; each sound has a seed of its own."""
    pairs = []
    for i, name in enumerate(names):
        ingredients, way = attributes(name)
        sound = torch.from_numpy(cook_sound(way, seed=seed + i))
        pairs.append((sound, "".join(ingredients)))
    return pairs
