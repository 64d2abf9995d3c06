"""Presets for photographs: a network on the latents of one's own images, on a CPU or a GPU.

A few thousand photographs are far fewer than the drawn dishes of presets.py, so the presets differ
in what works against memorising them: several views of each photograph, mirrored latents, dropout.
The autoencoder starts from trained weights and adds the distance in features to its loss.

    prepare_views       the training photographs' views in an LMDB store; the test photographs
    prepare_metrics     a linear probe on ImageNet features, and all that samples are compared with
    build_photo_networks    the UNet, the text encoder and the diffusion, with random weights

>>> from .presets import AUTOENCODER
>>> network, encoder, diffusion = build_photo_networks("麻婆豆腐", Autoencoder(**AUTOENCODER))
>>> network.settings["dropout"], len(diffusion)
(0.1, 1000)
"""

from pathlib import Path
from typing import NamedTuple

import torch

from datasets.aipos import AiposFood
from datasets.lmdb_store import ImageCaptionStore
from datasets.photo_views import build_view_store

from .diffusion.gaussian import GaussianDiffusion, velocity_weight
from .diffusion.schedule import NoiseSchedule
from .dish_classifier import load_whole_dataset
from .evaluation.photo_classifier import PhotoMetrics, compute_features
from .networks.autoencoder import Autoencoder
from .networks.image_features import ImageFeatures
from .networks.text_encoder import CharacterEncoder
from .networks.unet import UNet
from .networks.weights_io import load_tree, save_tree
from .presets import AUTOENCODER, LATENT_UNET
from .training.distributed import default_device

SIZE = 128              # height and width of an image in pixels
VIEWS = 5               # of each training photograph
TEST_FRACTION = 0.1     # of the photographs, kept out of all trainings
GUIDANCE = 3.0          # scale of classifier-free guidance
AUTOENCODER_TRAINING = dict(perceptual="efficientnet", perceptual_weight=0.3)
CPU_UNET = LATENT_UNET | dict(channels=(64, 128), dropout=0.1)
GPU_UNET = LATENT_UNET | dict(channels=(192, 256), heads=4, dropout=0.1)


class Photographs(NamedTuple):
    """The photographs of a folder.

    store: the views of the training photographs.
    test_images: uint8 [N, 3, H, W], the middle of each test photograph.
    test_names: their names.
    skipped: number of files that could not be decoded.
    """

    store: ImageCaptionStore
    test_images: torch.Tensor
    test_names: list[str]
    skipped: int


def prepare_views(
    folder, out: Path, size: int = SIZE, views: int = VIEWS, test_fraction: float = TEST_FRACTION
) -> Photographs:
    """Split the photographs of a folder, and store the views of the training photographs in `out`.

    folder: one subfolder per dish name, see AiposFood.

    Raises FileNotFoundError if one of the splits is empty.
    """
    training = AiposFood(folder, size, "train", test_fraction)
    test = AiposFood(folder, size, "test", test_fraction)
    store = build_view_store(training, out / f"photos_{size}", views)
    test_images, test_names = load_whole_dataset(test)
    return Photographs(store, test_images, test_names, training.skipped)


def prepare_metrics(photographs: Photographs, path: Path, network=None) -> PhotoMetrics:
    """Compute the features of all photographs, or load them from `path`, and train the probe.

    network: see ImageFeatures; None: EfficientNet-Lite 0.
    """
    network = ImageFeatures() if network is None else network
    network = network.to(default_device())
    images, names = load_whole_dataset(photographs.store)
    if path.exists():
        saved = load_tree(path)
    else:
        saved = {
            "training": compute_features(network, images, show_progress=True),
            "test": compute_features(network, photographs.test_images, show_progress=True),
        }
        save_tree(path, saved)
    if len(saved["training"]) != len(names) or len(saved["test"]) != len(photographs.test_names):
        raise ValueError(f"{path} holds the features of other photographs: remove it")
    return PhotoMetrics(
        network, (saved["training"], names), (saved["test"], photographs.test_names)
    )


def check_photo_networks(names: list[str], size: int) -> None:
    """Raise ValueError for names that are too long, or a size that the network cannot have."""
    autoencoder = Autoencoder(**AUTOENCODER)
    network, encoder, _ = build_photo_networks("".join(names), autoencoder)
    encoder.tokenize(names)
    multiple = autoencoder.factor * network.size_multiple
    if size % multiple:
        raise ValueError(f"--size must be a multiple of {multiple}, not {size}")


def build_photo_networks(
    characters: str, autoencoder: Autoencoder
) -> tuple[UNet, CharacterEncoder, GaussianDiffusion]:
    """Build (network, encoder, diffusion) for an autoencoder's latents, with random weights.

    characters: all characters that the encoder has an embedding for.
    The network is CPU_UNET, or GPU_UNET if there is a GPU.
    """
    settings = GPU_UNET if torch.cuda.is_available() else CPU_UNET
    channels = autoencoder.settings["latent_channels"]
    encoder = CharacterEncoder(characters, dim=128, layers=2)
    network = UNet(channels, channels, context_dim=encoder.dim, **settings)
    diffusion = GaussianDiffusion(
        NoiseSchedule.cosine(1000), prediction_type="x0", loss_weight=velocity_weight
    )
    return network, encoder, diffusion
