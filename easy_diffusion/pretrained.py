"""Trained models as files: the weights in half precision, and everything that rebuilds the model.

A folder of weights holds, for each image size that a model was trained for,

    text_to_image_SIZE.safetensors    the UNet and the text encoder
    text_to_film_SIZE.safetensors     the same for films: a VideoUNet and its text encoder
    autoencoder_SIZE.safetensors      the autoencoder, if the UNet was trained on latents
    audio_encoder_SIZE.safetensors    an audio encoder for that UNet, see condition_presets.py

The header of a file is JSON. It contains the settings of the networks, the characters that the
encoder knows, the prediction type and the betas of the schedule, the scale and shift of the
latents, and how the model was trained. `load_model` therefore needs nothing but the folder.

The folder weights/ of this repository holds models of 64 and 128 pixels; weights/README.md says
how they were trained. `python -m easy_diffusion.train_demo` writes such a folder, too.

>>> import tempfile
>>> from .presets import build_networks
>>> folder = tempfile.mkdtemp()
>>> save_model(folder, 32, Model(*build_networks("番茄汤"), autoencoder=None))
>>> find_sizes(folder)
[32]
>>> model = load_model(folder)
>>> model.diffusion.prediction_type, model.encoder.characters, model.autoencoder
('x0', '汤番茄', None)
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from .diffusion.gaussian import GaussianDiffusion, velocity_weight
from .diffusion.schedule import NoiseSchedule
from .latent_space import fingerprint
from .networks.audio_encoder import AudioEncoder
from .networks.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from .networks.joint_encoder import JointEncoder
from .networks.motion import VideoUNet
from .networks.text_encoder import CharacterEncoder
from .networks.unet import UNet
from .networks.weights_io import (
    check_unet,
    compute_weights_checksum,
    load_tree,
    load_weights,
    save_tree,
)
from .training.distributed import default_device

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"   # the models of this repository


class Model(NamedTuple):
    """A text-to-image model, or one of films: all that sampling needs.

    autoencoder: decodes the samples of a UNet that was trained on latents; None: it was trained
        on pixels.
    """

    network: UNet | VideoUNet
    encoder: CharacterEncoder | JointEncoder
    diffusion: GaussianDiffusion
    autoencoder: Autoencoder | None


def model_path(folder, size: int, films: bool = False) -> Path:
    """The file of the UNet and the text encoder for images, or films, of this size."""
    return Path(folder) / f"text_to_{'film' if films else 'image'}_{size}.safetensors"


def autoencoder_path(folder, size: int) -> Path:
    """The file of the autoencoder for images of this size."""
    return Path(folder) / f"autoencoder_{size}.safetensors"


def save_model(folder, size: int, model: Model, training: dict | None = None) -> None:
    """Write a model to `folder`, in half precision: about 2 bytes per weight.

    size: height and width in pixels of the images that it was trained for.
    model: its diffusion is a GaussianDiffusion, its encoder a CharacterEncoder.
    training: plain values that say how it was trained; the header contains them as "training".

    Raises ValueError for another diffusion, such as a SharedNoiseDiffusion.
    """
    network, encoder, diffusion, autoencoder = model
    if type(diffusion) is not GaussianDiffusion:
        raise ValueError(f"a file cannot hold a {type(diffusion).__name__}")
    if autoencoder is not None:
        path = autoencoder_path(folder, size)
        save_autoencoder(path, autoencoder, torch.float16)
        autoencoder = load_autoencoder(path)        # its fingerprint is that of rounded weights
    tree = {
        "size": size,
        "training": training or {},
        "network_settings": network.settings,
        "encoder_settings": encoder.settings,
        "prediction_type": diffusion.prediction_type,
        "variance": diffusion.variance,
        "betas": diffusion.schedule.betas,
        "autoencoder": None if autoencoder is None else fingerprint(autoencoder),
        "network": {name: tensor.half() for name, tensor in network.state_dict().items()},
        "encoder": {name: tensor.half() for name, tensor in encoder.state_dict().items()},
    }
    save_tree(model_path(folder, size, isinstance(network, VideoUNet)), tree)


def read_training(folder, size: int, films: bool = False) -> dict:
    """How a model was trained, the values that `save_model` was given as `training`."""
    return load_tree(model_path(folder, size, films))["training"]


def find_sizes(folder, films: bool = False) -> list[int]:
    """The sizes in pixels for which `folder` holds a model of images, or films, increasing."""
    pattern = model_path("", "*", films).name
    names = [path.name for path in Path(folder).glob(pattern)]
    matches = [re.fullmatch(pattern.replace("*", r"(\d+)"), name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def load_model(folder=WEIGHTS, size: int | None = None, films: bool = False) -> Model:
    """Rebuild a model in float32 and eval mode, on the GPU if there is one.

    folder: where `save_model` wrote it; by default the weights of this repository.
    size: of the images in pixels; None: the largest in the folder.
    films: whether to load a model of films.

    Raises FileNotFoundError if there is no such model, and ValueError for files that are damaged or
    do not belong together.
    """
    sizes = find_sizes(folder, films)
    if not sizes and films:
        raise FileNotFoundError(
            f"no trained model of films in {Path(folder).absolute()}: "
            "python -m easy_diffusion.train_motion trains one"
        )
    if not sizes:
        raise FileNotFoundError(
            f"no trained model in {Path(folder).absolute()}: this repository's are in its folder "
            "weights/; python -m easy_diffusion.train_demo trains one"
        )
    size = size or sizes[-1]
    if size not in sizes:
        known = ", ".join(str(known) for known in sizes)
        raise FileNotFoundError(f"{folder} has models for {known} pixels, not for {size}")
    path = model_path(folder, size, films)
    saved = load_tree(path)
    if not isinstance(saved, dict) or "encoder_settings" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not a model that save_model wrote")
    network = (VideoUNet if films else UNet)(**saved["network_settings"])
    load_weights(network, saved["network"])
    encoder = CharacterEncoder(**saved["encoder_settings"])
    load_weights(encoder, saved["encoder"])
    diffusion = GaussianDiffusion(
        NoiseSchedule(saved["betas"]),
        saved["prediction_type"],
        saved["variance"],
        loss_weight=velocity_weight,        # for further training, as in presets.py
    )
    autoencoder = None
    if saved["autoencoder"] is not None:
        autoencoder = load_autoencoder(autoencoder_path(folder, size))
        if fingerprint(autoencoder) != saved["autoencoder"]:
            raise ValueError(
                f"{path} was trained on the latents of another autoencoder than the one in "
                f"{autoencoder_path(folder, size)}"
            )
    for module in (network, encoder, autoencoder):
        if module is not None:
            module.eval().to(default_device())
    return Model(network, encoder, diffusion, autoencoder)


def load_pixel_model(folder, size: int) -> Model:
    """`load_model`, for commands that need a model of pixels; ValueError for one of latents."""
    model = load_model(folder, size)
    if model.autoencoder is not None:
        raise ValueError(
            f"the model of {size} pixels in {folder} works on latents; "
            "this command needs one that works on pixels, such as --size 64"
        )
    return model


# ---------------------------------------------------------------- audio encoders


def audio_encoder_path(folder, size: int) -> Path:
    """The file of the audio encoder for the UNet of this size."""
    return Path(folder) / f"audio_encoder_{size}.safetensors"


def save_audio_encoder(folder, size: int, model: Model, training: dict | None = None) -> None:
    """Write the audio encoder of a model in half precision; the rest of the model is not written.

    model: of `add_audio_encoder` in condition_presets.py. size, training: as for `save_model`.
    """
    audio = model.encoder.first
    tree = {
        "training": training or {},
        "audio_encoder_settings": audio.settings,
        "unet": compute_weights_checksum(model.network),
        "weights": {name: tensor.half() for name, tensor in audio.state_dict().items()},
    }
    save_tree(audio_encoder_path(folder, size), tree)


def find_sound_sizes(folder) -> list[int]:
    """The sizes in pixels for which `folder` holds a model and an audio encoder, increasing."""
    return [size for size in find_sizes(folder) if audio_encoder_path(folder, size).exists()]


def load_sound_model(folder=WEIGHTS, size: int | None = None) -> Model:
    """`load_model`, with an audio encoder beside the text encoder: captions are (sound, caption).

    size: None: the largest that has an audio encoder.

    Raises FileNotFoundError, or ValueError for an audio encoder that is damaged or that was trained
    for another UNet.
    """
    sizes = find_sound_sizes(folder)
    if not sizes or size not in (None, *sizes):
        raise FileNotFoundError(
            f"no audio encoder for {size or 'any number of'} pixels in {folder}: "
            "python -m easy_diffusion.train_sound trains one and writes it to out/sound/weights"
        )
    size = size or sizes[-1]
    model = load_model(folder, size)
    path = audio_encoder_path(folder, size)
    saved = load_tree(path)
    if not isinstance(saved, dict) or "audio_encoder_settings" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not an audio encoder")
    check_unet(path, saved["unet"], model.network)
    encoder = AudioEncoder(**saved["audio_encoder_settings"])
    load_weights(encoder, saved["weights"])
    encoder = encoder.eval().to(model.network.conv_in.weight.device)
    return model._replace(encoder=JointEncoder(encoder, model.encoder))
