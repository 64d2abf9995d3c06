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
from datasets.dishes import Dishes, dish_names, draw
from datasets.latents_lmdb import LatentLmdb, encode_store

from . import checkpoint as files
from .animate import contact_sheet, write_png
from .autoencoder import Autoencoder
from .batches import batches
from .diffusion import GaussianDiffusion, logit_normal_timesteps, velocity_weight
from .flow_matching import euler
from .inpaint import painter
from .latent import decoded, encoder_of, fingerprint, latent_painter, load_autoencoder, save_autoencoder
from .metrics import psnr, ssim
from .samplers import clipped, ddim, guided, to_pictures
from .schedule import NoiseSchedule
from .text import CharacterEncoder
from .train import fast_precision, train
from .train_autoencoder import measure_latents, train_autoencoder
from .unet import UNet
from .watch import watched

SIZE, DISHES, BATCH, LATENT_BATCH = 64, 20_000, 32, 64
AUTOENCODER, AUTOENCODER_BATCH = dict(channels=(64, 128), patch=4, latent_channels=16), 8
AUTOENCODER_TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.995)
REPAINT = dict(jump=5, resamples=4)
TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.998, decay=0.5, timesteps=logit_normal_timesteps)


def build(characters: str, autoencoder: Autoencoder | None = None):
    """The demo's network, encoder of those characters and diffusion: small enough for two CPU cores. With an autoencoder the network is for
    its latents; of pictures it sees 4×4 pixels as one place, of latents 2×2. These are so few that all of them look at each other."""
    encoder = CharacterEncoder(characters, dim=128, layers=2)
    channels, patch = (3, 4) if autoencoder is None else (autoencoder.settings["latent_channels"], 2)
    network = UNet(channels, channels, channels=(64, 128), attention=(autoencoder is not None, True), heads=2, patch=patch,
                   context_dim=encoder.dim, pooled=True)
    return network, encoder, GaussianDiffusion(NoiseSchedule.cosine(1000), predicts="x0", loss_weight=velocity_weight)


def prepare(folder: Path, count: int, size: int) -> lmdb_store.ImageCaptionStore:
    """The store of `count` drawn dishes; whatever is there already is kept."""
    dishes = Dishes(count, size)
    lmdb_store.settle(folder)
    done = lmdb_store.count(folder)
    if done < count:
        missing = torch.utils.data.Subset(dishes, range(done, count))
        drawn = torch.utils.data.DataLoader(missing, batch_size=None, num_workers=2)
        bar = tqdm(lmdb_store.append(folder, drawn), initial=done, total=count, desc="drawing dishes", unit="dish")
        for _ in bar:
            pass
    return lmdb_store.ImageCaptionStore(folder)


def train_the_autoencoder(autoencoder: Autoencoder, store, checkpoint: Path | None, minutes: float):
    """The demo's training of an autoencoder, as a generator of steps."""
    return train_autoencoder(autoencoder, batches(store, AUTOENCODER_BATCH), minutes=minutes, steps=10 ** 7, checkpoint=checkpoint,
                             save_seconds=min(30, 3 * minutes), **AUTOENCODER_TRAINING)


def prepare_latents(store, out: Path, size: int, minutes: float, judge: Callable | None = None) -> tuple[LatentLmdb, Autoencoder]:
    """The store's latents, and the autoencoder that made them; each is made, or finished, if it is not there yet. judge: see `look_at`."""
    path, checkpoint = out / f"autoencoder_{size}.safetensors", out / f"autoencoder_{size}.training.safetensors"
    sheet, looked = out / f"autoencoder_{size}.png", 0.0
    if not path.exists():
        steps = train_the_autoencoder(Autoencoder(**AUTOENCODER), store, checkpoint, minutes)
        for step in watched(steps, description="training the autoencoder"):
            if step.seconds > looked + 60:
                looked = step.seconds
                tqdm.write(f"after {looked / 60:.1f} minutes {look_at(step.autoencoder, sheet, size, judge)}")
        autoencoder = Autoencoder(**AUTOENCODER)
        files.load_into(autoencoder, files.load(checkpoint)["models"]["average"])
        measure_latents(autoencoder, batches(store, BATCH))
        save_autoencoder(path, autoencoder)
        print(look_at(autoencoder, sheet, size, judge))
    autoencoder = load_autoencoder(path).to("cuda" if torch.cuda.is_available() else "cpu")
    folder, encode = out / f"latents_{size}", encoder_of(autoencoder)

    def encode_fast(pictures):
        with autocast(next(autoencoder.parameters()).device):
            return encode(pictures)

    for done in tqdm(encode_store(store.folder, folder, encode_fast, fingerprint(autoencoder), batch=BATCH), desc="encoding dishes",
                     unit="batch", total=-(-len(store) // BATCH)):
        pass
    return LatentLmdb(folder, fingerprint(autoencoder)), autoencoder


def look_at(autoencoder: Autoencoder, path: Path, size: int, judge: Callable | None = None, count: int = 100) -> str:
    """Write held-out dishes, each as drawn and as the autoencoder gives it back, into a picture; how near `count` of them are, in words.

    judge: (pictures uint8 [B, 3, H, W], names) → the share of them that show what their names say, such as a reader's."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    real = torch.from_numpy(np.stack([draw(name, size, seed=1) for name in names]))                         # [B, 3, H, W]
    back = given_back(autoencoder, real)
    pairs = torch.stack([real, back], dim=1)[:12].permute(0, 1, 3, 4, 2).numpy()                            # [12, 2, H, W, 3]
    write_png(path, contact_sheet([list(pair) for pair in pairs], names[:12], columns=3, side=size))
    read = f", {judge(back, names):.0%} read fully right" if judge is not None else ""
    return f"held-out dishes come back with a PSNR of {psnr(real, back).mean():.1f} dB, an SSIM of {ssim(real, back).mean():.2f}{read}"


def given_back(autoencoder: Autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    """What an autoencoder makes of pictures uint8 [B, 3, H, W]: the same, encoded and decoded."""
    encode = encoder_of(autoencoder)
    with autocast(next(autoencoder.parameters()).device):
        return torch.cat([torch.from_numpy(decoded(autoencoder, encode(some)[0])).permute(0, 3, 1, 2) for some in pictures.split(25)])


def training(network, encoder, diffusion, store, checkpoint: Path | None, minutes: float, **changes):
    """The demo's training, as a generator of steps. store: of pictures, or of latents, which are so small that more of them go together;
    changes: what of TRAINING is to be otherwise."""
    loader = batches(store, LATENT_BATCH if isinstance(store, LatentLmdb) else BATCH)
    return train(network, diffusion, loader, encoder, minutes=minutes, steps=10 ** 7, checkpoint=checkpoint, keep=1,
                 save_seconds=min(30, 3 * minutes), **TRAINING | changes)


def load_average(network, encoder, state: dict) -> None:
    """A checkpoint's EMA weights into network and encoder, ready to draw, on the GPU if there is one."""
    both = torch.nn.ModuleDict({"network": network, "encoder": encoder})
    files.load_into(both, state)
    both.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def fit(network, encoder, diffusion, store, checkpoint: Path, minutes: float) -> list[float]:
    """Train, with a progress bar, unless the checkpoint is of a finished training; load the EMA's weights into network and encoder.
    Returns the loss of each step."""
    saved = files.load(checkpoint) if checkpoint.exists() else None
    if saved is None or saved["progress"] < 1:
        for _ in watched(training(network, encoder, diffusion, store, checkpoint, minutes)):
            pass
        saved = files.load(checkpoint)
    load_average(network, encoder, saved["average"])
    return saved["losses"]


def autocast(device):
    """bfloat16 for sampling, where this machine computes in it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_precision() == "bf16")


@torch.no_grad()
def guided_denoiser(network, encoder, diffusion, names: list[str], guidance: float, clip: bool = True):
    """The denoiser of these dishes: guided, clipped to what pictures are, in half precision where that is faster."""
    with autocast(next(network.parameters()).device):
        text, nothing = encoder(names), encoder([""])
    denoise = guided(diffusion.denoiser(network, *text), diffusion.denoiser(network, *nothing), guidance)
    denoise = clipped(denoise, diffusion.schedule) if clip else denoise

    def denoise_fast(x_t, t):
        with autocast(x_t.device):
            return denoise(x_t, t)

    return denoise_fast


def sample(network, encoder, diffusion, names: list[str], size: int = SIZE, steps: int = 25, guidance: float = 2.0, seed: int = 0,
           bar: bool = False, autoencoder: Autoencoder | None = None) -> np.ndarray:
    """One picture for each name by DDIM, or by Euler's steps if the network has learned a flow, uint8 [B, size, size, 3]."""
    channels, factor = (3, 1) if autoencoder is None else (autoencoder.settings["latent_channels"], autoencoder.factor)
    denoise = guided_denoiser(network, encoder, diffusion, names, guidance, clip=autoencoder is None)
    how = dict(shape=(len(names), channels, size // factor, size // factor), steps=steps,
               generator=torch.Generator().manual_seed(seed), device=next(network.parameters()).device)
    walk = euler(denoise, **how) if diffusion.predicts == "velocity" else ddim(denoise, diffusion.schedule, **how)
    *_, last = tqdm(walk, total=steps, desc=f"sampling {len(names)} dishes", unit="step", disable=not bar)
    return to_pictures(last.x) if autoencoder is None else decoded(autoencoder, last.x)


def painter_of(network, encoder, diffusion, autoencoder, name: str, steps: int = 25, guidance: float = 2.0, seed: int = 1,
               watch: Callable = iter) -> Callable:
    """The demo's painter, RePaint in pixels or latents: of more of the dish of this name, or, for "", of what there is around one.

    seed: of its noise, from one painted part to the next; another one than the dish's own, which would be the same noise again."""
    denoise = guided_denoiser(network, encoder, diffusion, [name], guidance, clip=autoencoder is None)
    how = dict(steps=steps, generator=torch.Generator().manual_seed(seed), multiple=network.multiple, watch=watch, **REPAINT)
    if autoencoder is None:
        return painter(denoise, diffusion.schedule, device=next(network.parameters()).device, **how)
    return latent_painter(denoise, diffusion.schedule, autoencoder, **how)
