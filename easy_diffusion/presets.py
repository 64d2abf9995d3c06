"""The demo's recipe: its drawn dishes, its networks and how long and how fast they learn. Small enough for two CPU cores.

Everything is kept in a folder and made, or finished, if it is not there yet: a store of dishes, the checkpoint of a training, and, to learn
in latent space, an autoencoder and the dishes that it has encoded. So whoever asks again, or after a crash, goes on from there. demo.py is
the command that cooks by it; benchmarks and notebooks do, too. This file stands just below the roof: no other module imports it.

>>> network, encoder, diffusion = build("番茄炒鸡蛋")
>>> sample(network, encoder, diffusion, ["番茄炒鸡蛋"], steps=2, size=32).shape
(1, 32, 32, 3)
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from datasets import lmdb_store
from datasets.dishes import Dishes, dish_names, draw_dish
from datasets.latents_lmdb import LatentLmdb, encode_store

from .diffusion.gaussian import GaussianDiffusion, velocity_weight
from .diffusion.schedule import NoiseSchedule
from .diffusion.timesteps import logit_normal_timesteps
from .evaluation.metrics import psnr, ssim
from .files import write_atomically
from .images import contact_sheet, encode_png
from .latent_space import decode_to_uint8, fingerprint, make_encoder
from .networks.autoencoder import Autoencoder
from .networks.text_encoder import CharacterEncoder
from .networks.unet import UNet
from .networks.weights_io import load_autoencoder, load_weights, save_autoencoder
from .training.checkpoint import load_checkpoint, load_ema_weights
from .training.data_loader import make_loader
from .training.distributed import autocast
from .training.progress import track_progress
from .training.train_autoencoder import measure_latent_scale, train_autoencoder
from .training.trainer import train

SIZE, DISHES, BATCH, LATENT_BATCH = 64, 20_000, 32, 64
AUTOENCODER, AUTOENCODER_BATCH = dict(channels=(64, 128), patch=4, latent_channels=16), 8
AUTOENCODER_TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.995)
REPAINT = dict(jump=5, resamples=4)
TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.998, decay=0.5, timesteps=logit_normal_timesteps)


def build_networks(characters: str, autoencoder: Autoencoder | None = None):
    """The demo's network, encoder of those characters and diffusion: small enough for two CPU cores. With an autoencoder the network is for
    its latents; of pictures it sees 4×4 pixels as one place, of latents 2×2. These are so few that all of them look at each other."""
    encoder = CharacterEncoder(characters, dim=128, layers=2)
    channels, patch = (3, 4) if autoencoder is None else (autoencoder.settings["latent_channels"], 2)
    network = UNet(channels, channels, channels=(64, 128), attention=(autoencoder is not None, True), heads=2, patch=patch,
                   context_dim=encoder.dim, pooled=True)
    return network, encoder, GaussianDiffusion(NoiseSchedule.cosine(1000), prediction_type="x0", loss_weight=velocity_weight)


def prepare_dishes(folder: Path, count: int, size: int) -> lmdb_store.ImageCaptionStore:
    """The store of `count` drawn dishes; whatever is there already is kept."""
    dishes = Dishes(count, size)
    lmdb_store.recover(folder)
    done = lmdb_store.count_records(folder)
    if done < count:
        missing = torch.utils.data.Subset(dishes, range(done, count))
        drawn = torch.utils.data.DataLoader(missing, batch_size=None, num_workers=2)
        bar = tqdm(lmdb_store.append_records(folder, drawn), initial=done, total=count, desc="drawing dishes", unit="dish")
        for _ in bar:
            pass
    return lmdb_store.ImageCaptionStore(folder)


def train_demo_autoencoder(autoencoder: Autoencoder, store, checkpoint: Path | None, minutes: float):
    """The demo's training of an autoencoder, as a generator of steps."""
    return train_autoencoder(autoencoder, make_loader(store, AUTOENCODER_BATCH), minutes=minutes, steps=10 ** 7, checkpoint=checkpoint,
                             save_seconds=min(30, 3 * minutes), **AUTOENCODER_TRAINING)


def prepare_latents(store, out: Path, size: int, minutes: float, judge: Callable | None = None) -> tuple[LatentLmdb, Autoencoder]:
    """The store's latents, and the autoencoder that made them; each is made, or finished, if it is not there yet. judge: see `look_at`."""
    path, checkpoint = out / f"autoencoder_{size}.safetensors", out / f"autoencoder_{size}.training.safetensors"
    sheet, looked = out / f"autoencoder_{size}.png", 0.0
    if not path.exists():
        steps = train_demo_autoencoder(Autoencoder(**AUTOENCODER), store, checkpoint, minutes)
        for step in track_progress(steps, description="training the autoencoder"):
            if step.seconds > looked + 60:
                looked = step.seconds
                tqdm.write(f"after {looked / 60:.1f} minutes {evaluate_autoencoder(step.autoencoder, sheet, size, judge)}")
        autoencoder = Autoencoder(**AUTOENCODER)
        load_weights(autoencoder, load_checkpoint(checkpoint)["models"]["ema"])
        measure_latent_scale(autoencoder, make_loader(store, BATCH))
        save_autoencoder(path, autoencoder)
        print(evaluate_autoencoder(autoencoder, sheet, size, judge))
    autoencoder = load_autoencoder(path).to("cuda" if torch.cuda.is_available() else "cpu")
    folder, encode = out / f"latents_{size}", make_encoder(autoencoder)

    def encode_fast(pictures):
        with autocast(next(autoencoder.parameters()).device):
            return encode(pictures)

    for done in tqdm(encode_store(store.folder, folder, encode_fast, fingerprint(autoencoder), batch=BATCH), desc="encoding dishes",
                     unit="batch", total=-(-len(store) // BATCH)):
        pass
    return LatentLmdb(folder, fingerprint(autoencoder)), autoencoder


def evaluate_autoencoder(autoencoder: Autoencoder, path: Path, size: int, judge: Callable | None = None, count: int = 100) -> str:
    """Write held-out dishes, each as drawn and as the autoencoder gives it back, into a picture; how near `count` of them are, in words.

    judge: (pictures uint8 [B, 3, H, W], names) → the share of them that show what their names say, such as a reader's."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    real = torch.from_numpy(np.stack([draw_dish(name, size, seed=1) for name in names]))                         # [B, 3, H, W]
    back = reconstruct(autoencoder, real)
    pairs = torch.stack([real, back], dim=1)[:12].permute(0, 1, 3, 4, 2).numpy()                            # [12, 2, H, W, 3]
    write_atomically(path, encode_png(contact_sheet([list(pair) for pair in pairs], names[:12], columns=3, side=size)))
    read = f", {judge(back, names):.0%} read fully right" if judge is not None else ""
    return f"held-out dishes come back with a PSNR of {psnr(real, back).mean():.1f} dB, an SSIM of {ssim(real, back).mean():.2f}{read}"


def reconstruct(autoencoder: Autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    """What an autoencoder makes of pictures uint8 [B, 3, H, W]: the same, encoded and decoded."""
    encode = make_encoder(autoencoder)
    with autocast(next(autoencoder.parameters()).device):
        return torch.cat([torch.from_numpy(decode_to_uint8(autoencoder, encode(some)[0])).permute(0, 3, 1, 2) for some in pictures.split(25)])


def train_demo(network, encoder, diffusion, store, checkpoint: Path | None, minutes: float, **changes):
    """The demo's training, as a generator of steps. store: of pictures, or of latents, which are so small that more of them go together;
    changes: what of TRAINING is to be otherwise."""
    loader = make_loader(store, LATENT_BATCH if isinstance(store, LatentLmdb) else BATCH)
    return train(network, diffusion, loader, encoder, minutes=minutes, steps=10 ** 7, checkpoint=checkpoint, keep=1,
                 save_seconds=min(30, 3 * minutes), **TRAINING | changes)


def train_or_load(network, encoder, diffusion, store, checkpoint: Path, minutes: float) -> list[float]:
    """Train, with a progress bar, unless the checkpoint is of a finished training; load the EMA's weights into network and encoder.
    Returns the loss of each step."""
    saved = load_checkpoint(checkpoint) if checkpoint.exists() else None
    if saved is None or saved["progress"] < 1:
        for _ in track_progress(train_demo(network, encoder, diffusion, store, checkpoint, minutes)):
            pass
        saved = load_checkpoint(checkpoint)
    load_ema_weights(network, encoder, saved["ema"])
    return saved["losses"]
