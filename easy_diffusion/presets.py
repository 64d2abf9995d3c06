"""The demo's data sets, networks and hyperparameters, small enough for two CPU cores.

Each function prepares one part of the demo and saves it in a folder:

    prepare_dishes     an LMDB store of drawn dishes
    prepare_latents    an autoencoder, and a store of the dishes' latents
    train_or_load      a diffusion network, trained on either store

A part that the folder already contains is loaded. A part that was interrupted is resumed.
train_demo.py, the notebooks and the benchmarks use these presets.

>>> network, encoder, diffusion = build_networks("番茄炒鸡蛋")
>>> context, mask = encoder(["番茄炒鸡蛋"])
>>> x_t, t = torch.randn(1, 3, 32, 32), torch.tensor([999])
>>> tuple(network(x_t, t, context, mask).shape)
(1, 3, 32, 32)
"""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from datasets import lmdb_environment, lmdb_store
from datasets.dishes import Dishes, dish_names, draw_dish
from datasets.latents_lmdb import LatentLmdb, encode_store

from .diffusion.gaussian import GaussianDiffusion, velocity_weight
from .diffusion.schedule import NoiseSchedule
from .diffusion.timesteps import logit_normal_timesteps
from .evaluation.metrics import psnr, ssim
from .files import write_atomically
from .images import contact_sheet, encode_png
from .latent_space import decode_to_uint8, fingerprint, make_encoder
from .networks.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from .networks.text_encoder import CharacterEncoder
from .networks.unet import UNet
from .networks.weights_io import load_weights
from .training.checkpoint import load_checkpoint, load_ema_weights
from .training.data_loader import make_loader
from .training.distributed import autocast, default_device
from .training.progress import track_progress
from .training.train_autoencoder import measure_latent_scale, train_autoencoder
from .training.trainer import train

SIZE = 64               # height and width of an image in pixels
LATENT_SIZE = 128       # the same for a network that is trained on latents
DISHES = 20_000         # drawn dishes to train on
BATCH = 32              # images per training step
LATENT_BATCH = 64       # latents per training step; a latent is smaller than an image
GPU_BATCH = 512         # images or latents per step on a GPU; smaller batches leave it idle
TRAINING = dict(
    learning_rate=2e-3,
    muon_learning_rate=3e-3,
    ema=0.998,
    decay=0.5,
    timesteps=logit_normal_timesteps,
)

# On pixels, squares of 4×4 are one position: both UNets have 16×16 positions at the finer level.
# Attention is at the coarser level.
PIXEL_UNET = dict(channels=(64, 128), attention=(False, True), heads=2, patch=4, pooled=True)
LATENT_UNET = dict(channels=(96, 128), attention=(False, True), heads=2, patch=1, pooled=True)

AUTOENCODER = dict(channels=(64, 128), patch=4, latent_channels=16)
AUTOENCODER_BATCH = 8   # images per training step of the autoencoder
AUTOENCODER_TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.995)

REPAINT = dict(jump=5, resamples=4)     # of RePaint; see inpainting/repaint.py


# ------------------------------------------------------------------ networks


def build_networks(
    characters: str, autoencoder: Autoencoder | None = None
) -> tuple[UNet, CharacterEncoder, GaussianDiffusion]:
    """Build the demo's (network, encoder, diffusion), with random weights.

    characters: all characters that the encoder has an embedding for.
    autoencoder: build the network for its latents; None: for RGB pixels.
    """
    encoder = CharacterEncoder(characters, dim=128, layers=2)
    if autoencoder is None:
        network = UNet(3, 3, context_dim=encoder.dim, **PIXEL_UNET)
    else:
        channels = autoencoder.settings["latent_channels"]
        network = UNet(channels, channels, context_dim=encoder.dim, **LATENT_UNET)
    diffusion = GaussianDiffusion(
        NoiseSchedule.cosine(1000), prediction_type="x0", loss_weight=velocity_weight
    )
    return network, encoder, diffusion


# ------------------------------------------------------------------ drawn dishes


def prepare_dishes(
    folder: Path, count: int, size: int, dataset: Callable = Dishes
) -> lmdb_store.ImageCaptionStore:
    """Open the LMDB store of `count` drawn dishes in `folder`, and draw those that are missing.

    A store that already holds more is returned with all of them.

    size: height and width of the images in pixels.
    dataset: (count, size) → the dataset that is stored, such as DishFilms.
    """
    lmdb_environment.recover(folder)
    existing = lmdb_store.count_records(folder)
    if existing < count:
        missing = torch.utils.data.Subset(dataset(count, size), range(existing, count))
        workers = min(8, os.cpu_count() or 1)
        records = torch.utils.data.DataLoader(missing, batch_size=None, num_workers=workers)
        for _ in tqdm(
            lmdb_store.append_records(folder, records),
            initial=existing,
            total=count,
            desc="rendering dishes",
            unit="dish",
        ):
            pass
    return lmdb_store.ImageCaptionStore(folder)


# ------------------------------------------------------------------ diffusion training


def train_demo(
    network, encoder, diffusion, store, checkpoint: Path | None, minutes: float,
    batch_size: int | None = None, **changes,
) -> Iterator:
    """Train the demo's network; yields every TrainingStep.

    store: a dataset of images, or a LatentLmdb.
    checkpoint: file to save to and to resume from; None: neither.
    batch_size: images or latents per step; None: `default_batch_size`, at most the whole store.
    changes: arguments of `train` that replace those of TRAINING.
    """
    if batch_size is None:
        batch_size = min(default_batch_size(isinstance(store, LatentLmdb)), len(store))
    return train(
        network,
        diffusion,
        make_loader(store, batch_size),
        encoder,
        minutes=minutes,
        steps=None,
        checkpoint=checkpoint,
        keep=1,
        save_seconds=min(30, 3 * minutes),
        **TRAINING | changes,
    )


def default_minutes() -> float:
    """Training time of the network in minutes on this machine."""
    return 2.5 if torch.cuda.is_available() else 10.0


def default_batch_size(latent: bool) -> int:
    """Images or, with `latent`, latents per training step on this machine."""
    if torch.cuda.is_available():
        return GPU_BATCH
    return LATENT_BATCH if latent else BATCH


def train_or_load(
    network, encoder, diffusion, store, checkpoint: Path, minutes: float, **changes
) -> list[float]:
    """Train with a progress bar, unless the checkpoint is of a finished training.

    Then load the EMA weights into network and encoder, and return the loss of each step.
    store, changes: see `train_demo`; not used if the training has finished.
    """
    saved = load_checkpoint(checkpoint) if checkpoint.exists() else None
    if saved is None or saved["progress"] < 1:
        steps = train_demo(network, encoder, diffusion, store, checkpoint, minutes, **changes)
        for _ in track_progress(steps):
            pass
        saved = load_checkpoint(checkpoint)
    load_ema_weights(network, encoder, diffusion, saved)
    return saved["losses"]


def describe_training(dishes: int, batch_size: int, latent: bool) -> dict:
    """The data and the hyperparameters of the demo's training, as plain values for a header.

    dishes: number of drawn dishes. latent: whether an autoencoder was trained, too.
    """
    training = {"dishes": dishes, "batch_size": batch_size}
    training |= TRAINING | {"timesteps": TRAINING["timesteps"].__name__}
    if latent:
        training["autoencoder"] = {"batch_size": AUTOENCODER_BATCH} | AUTOENCODER_TRAINING
    return training


# ------------------------------------------------------------------ autoencoder and latents


def prepare_latents(
    store,
    out: Path,
    size: int,
    minutes: float,
    evaluate: Callable | None = None,
    initial: Autoencoder | None = None,
    mirrored: bool = False,
    **changes,
) -> tuple[LatentLmdb, Autoencoder]:
    """Train an autoencoder on a store of images, and encode the store: (latents, autoencoder).

    out: folder for the autoencoder and the latents; what it already contains is not redone.
    size: height and width of the images, which the file names contain.
    minutes: training time of the autoencoder.
    evaluate: (autoencoder, path of a PNG file to write) → a sentence, such as
        `evaluate_autoencoder` with its other arguments; None: on 100 held-out drawn dishes.
    initial: an autoencoder whose weights the training starts from; None: random weights.
    mirrored: whether the mirrored images are trained on and encoded, too.
    changes: arguments of `train_autoencoder` that replace those of AUTOENCODER_TRAINING.
    """
    path = out / f"autoencoder_{size}.safetensors"
    if not path.exists():
        if evaluate is None:
            names = random.Random(0).sample(dish_names("held_out"), 100)
            images = np.stack([draw_dish(name, size, seed=1) for name in names])
            evaluate = partial(
                evaluate_autoencoder, images=torch.from_numpy(images), names=names
            )
        train_and_save_autoencoder(store, path, minutes, evaluate, initial, mirrored, **changes)
    autoencoder = load_autoencoder(path).to(default_device())
    encode = make_encoder(autoencoder)

    def encode_autocast(images):
        with autocast(next(autoencoder.parameters()).device):
            return encode(images)

    folder = out / f"latents_{size}"
    for _ in tqdm(
        encode_store(
            store.folder, folder, encode_autocast, fingerprint(autoencoder), mirrored, BATCH
        ),
        desc="encoding images",
        unit="batch",
        total=-(-len(store) // BATCH),
    ):
        pass
    return LatentLmdb(folder, fingerprint(autoencoder)), autoencoder


def train_and_save_autoencoder(
    store,
    path: Path,
    minutes: float,
    evaluate: Callable,
    initial: Autoencoder | None = None,
    mirrored: bool = False,
    **changes,
) -> None:
    """Train the demo's autoencoder, or resume its training, and save it as `path`.

    Beside path = NAME.safetensors lie the checkpoint NAME.training.safetensors and the image
    NAME.png of `evaluate`, which is renewed after each tenth of the training, but not more often
    than once a minute. Arguments as for `prepare_latents`.
    """
    checkpoint = path.with_suffix(".training.safetensors")
    sheet = path.with_suffix(".png")
    autoencoder = Autoencoder(**AUTOENCODER)
    if initial is not None:
        load_weights(autoencoder, initial.state_dict())
    images = Mirrored(store) if mirrored else store
    steps = train_demo_autoencoder(autoencoder, images, checkpoint, minutes, **changes)
    evaluated_at = 0.0      # seconds
    for step in track_progress(steps, description="training the autoencoder"):
        if step.seconds > evaluated_at + max(60, minutes * 60 / 10):
            evaluated_at = step.seconds
            result = evaluate(step.autoencoder, sheet)
            tqdm.write(f"after {evaluated_at / 60:.1f} minutes {result}")
    autoencoder = Autoencoder(**AUTOENCODER)
    load_weights(autoencoder, load_checkpoint(checkpoint)["models"]["ema"])
    measure_latent_scale(autoencoder, make_loader(store, min(BATCH, len(store))))
    save_autoencoder(path, autoencoder)
    print(evaluate(autoencoder, sheet))


class Mirrored(torch.utils.data.Dataset):
    """The images of a dataset, each mirrored horizontally with probability ½ at each access."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, caption = self.dataset[index]
        return (image.flip(2) if torch.rand(()) < 0.5 else image), caption


def train_demo_autoencoder(
    autoencoder: Autoencoder, store, checkpoint: Path | None, minutes: float, **changes
) -> Iterator:
    """Train the demo's autoencoder on a dataset of images; yields every AutoencoderStep.

    changes: arguments of `train_autoencoder` that replace those of AUTOENCODER_TRAINING.
    """
    return train_autoencoder(
        autoencoder,
        make_loader(store, min(AUTOENCODER_BATCH, len(store))),
        minutes=minutes,
        steps=None,
        checkpoint=checkpoint,
        save_seconds=min(30, 3 * minutes),
        **AUTOENCODER_TRAINING | changes,
    )


def evaluate_autoencoder(
    autoencoder: Autoencoder,
    path: Path,
    images: torch.Tensor,
    names: list[str],
    measure_accuracy: Callable | None = None,
) -> str:
    """Reconstruct held-out images uint8 [N, 3, H, W]; returns a sentence with PSNR and SSIM.

    path: PNG file to write, with up to twelve of the images (left) and their reconstructions
        (right).
    measure_accuracy: (images uint8 [N, 3, H, W], names) → accuracy in [0, 1], which then is also
        part of the sentence.
    """
    reconstructions = reconstruct(autoencoder, images)              # [N, 3, H, W]
    shown = range(0, len(images), -(-len(images) // 12))
    pairs = torch.stack([images, reconstructions], dim=1)[list(shown)]      # [12, 2, 3, H, W]
    rows = [list(pair) for pair in pairs.permute(0, 1, 3, 4, 2).numpy()]
    sheet = contact_sheet(rows, [names[i] for i in shown], columns=3, side=images.shape[2])
    write_atomically(path, encode_png(sheet))
    sentence = (
        "held-out images are reconstructed with a PSNR of "
        f"{psnr(images, reconstructions).mean():.1f} dB "
        f"and an SSIM of {ssim(images, reconstructions).mean():.2f}"
    )
    if measure_accuracy is not None:
        sentence += f"; accuracy {measure_accuracy(reconstructions, names):.0%}"
    return sentence


def reconstruct(autoencoder: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images uint8 [B, 3, H, W]; returns the same shape and type."""
    encode = make_encoder(autoencoder)
    reconstructions = []
    with autocast(next(autoencoder.parameters()).device):
        for batch in images.split(25):
            mean, _ = encode(batch)
            decoded = torch.from_numpy(decode_to_uint8(autoencoder, mean))      # [B, H, W, 3]
            reconstructions.append(decoded.permute(0, 3, 1, 2))
    return torch.cat(reconstructions)
