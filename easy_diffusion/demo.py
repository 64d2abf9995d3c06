"""From a dish's name to a moving picture, by one command: python -m easy_diffusion.demo 番茄炒鸡蛋 --move right

The first run draws dishes into a store, trains a network on them from scratch and remembers it; a later run, or one after
a crash, goes on from there. Then it samples the dish, repaints what the camera's move uncovers, and writes into `out/`:

    <name>_<move>.gif      the dish, moving
    <name>.png             the dish
    held_out_64.png        held-out dishes, sampled (left) beside a real drawing (right): combinations it never saw
    loss_64.png            the loss of the training
    autoencoder_128.png    with --latent: held-out dishes, and what the autoencoder gives back

With --latent the network learns in the space of an autoencoder, which is trained first, on the same dishes: pictures of twice the side
at the same cost. Each dish is encoded once, and its latent kept.

This file is the roof of the house: it imports from everywhere, and nothing imports it but notebooks and benchmarks.

>>> network, encoder, diffusion = build("番茄炒鸡蛋")
>>> sample(network, encoder, diffusion, ["番茄炒鸡蛋"], steps=2, size=32).shape
(1, 32, 32, 3)
"""

import argparse
import io
import itertools
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from datasets import lmdb_store
from datasets.dishes import Dishes, attributes, dish_names, draw
from datasets.latents_lmdb import LatentLmdb, encode_store

from . import checkpoint as files
from .animate import animate, contact_sheet, write_atomically, write_gif, write_png
from .autoencoder import Autoencoder
from .batches import batches
from .camera import MOVES
from .diffusion import GaussianDiffusion, logit_normal_timesteps, velocity_weight
from .inpaint import painter
from .latent import decoded, encoder_of, fingerprint, latent_painter, load_autoencoder, save_autoencoder
from .metrics import psnr, ssim
from .samplers import clipped, ddim, guided, to_pictures
from .schedule import NoiseSchedule
from .text import CharacterEncoder
from .train import fast_precision, train
from .train_autoencoder import measure_latents, train_autoencoder
from .unet import UNet

SIZE, DISHES, BATCH = 64, 20_000, 32
AUTOENCODER, AUTOENCODER_BATCH = dict(channels=(64, 128), patch=4), 8
AUTOENCODER_TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.995)
TRAINING = dict(learning_rate=2e-3, muon_learning_rate=3e-3, ema=0.998, decay=0.5, timesteps=logit_normal_timesteps)


def build(characters: str, autoencoder: Autoencoder | None = None):
    """The demo's network, encoder of those characters and diffusion: small enough for two CPU cores. With an autoencoder the network is for
    its latents, which are so small that each of their numbers is looked at on its own."""
    encoder = CharacterEncoder(characters, dim=128, layers=2)
    channels, patch = (3, 4) if autoencoder is None else (autoencoder.settings["latent_channels"], 1)
    network = UNet(channels, channels, channels=(64, 128), attention=(False, True), heads=2, patch=patch, context_dim=encoder.dim,
                   pooled=True)
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


def prepare_latents(store, out: Path, size: int, minutes: float) -> tuple[LatentLmdb, Autoencoder]:
    """The store's latents, and the autoencoder that made them; each is made, or finished, if it is not there yet."""
    path, checkpoint = out / f"autoencoder_{size}.safetensors", out / f"autoencoder_{size}.training.safetensors"
    sheet, looked = out / f"autoencoder_{size}.png", 0.0
    if not path.exists():
        with tqdm(total=100, desc="training the autoencoder", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}") as bar:
            for step in train_the_autoencoder(Autoencoder(**AUTOENCODER), store, checkpoint, minutes):
                left = step.seconds * (1 / step.progress - 1)
                bar.set_postfix_str(f"step {step.index}, error {step.terms['reconstruction']:.4f}, "
                                    f"{step.pictures_per_second:.0f} pictures/s, {left / 60:.1f} min left", refresh=False)
                bar.update(100 * step.progress - bar.n)
                if step.seconds > looked + 60:
                    looked = step.seconds
                    bar.write(f"after {looked / 60:.1f} minutes {look_at(step.autoencoder, sheet, size)}")
        autoencoder = Autoencoder(**AUTOENCODER)
        files.load_into(autoencoder, files.load(checkpoint)["models"]["average"])
        measure_latents(autoencoder, batches(store, BATCH))
        save_autoencoder(path, autoencoder)
        print(look_at(autoencoder, sheet, size))
    autoencoder = load_autoencoder(path).to("cuda" if torch.cuda.is_available() else "cpu")
    folder, encode = out / f"latents_{size}", encoder_of(autoencoder)

    def encode_fast(pictures):
        with autocast(next(autoencoder.parameters()).device):
            return encode(pictures)

    for done in tqdm(encode_store(store.folder, folder, encode_fast, fingerprint(autoencoder), batch=BATCH), desc="encoding dishes",
                     unit="batch", total=-(-len(store) // BATCH)):
        pass
    return LatentLmdb(folder, fingerprint(autoencoder)), autoencoder


def look_at(autoencoder: Autoencoder, path: Path, size: int, count: int = 12) -> str:
    """Write held-out dishes, each as drawn and as the autoencoder gives it back, into a picture; how near they are, in words."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    real = torch.from_numpy(np.stack([draw(name, size, seed=1) for name in names]))                         # [B, 3, H, W]
    back = decoded(autoencoder, encoder_of(autoencoder)(real)[0])                                           # [B, H, W, 3]
    write_png(path, contact_sheet([list(pair) for pair in zip(real.permute(0, 2, 3, 1).numpy(), back)], names, columns=3, side=size))
    back = torch.from_numpy(back).permute(0, 3, 1, 2)
    return f"held-out dishes come back with a PSNR of {psnr(real, back).mean():.1f} dB, an SSIM of {ssim(real, back).mean():.2f}"


def training(network, encoder, diffusion, store, checkpoint: Path | None, minutes: float):
    """The demo's training, as a generator of steps."""
    return train(network, diffusion, batches(store, BATCH), encoder, minutes=minutes, steps=10 ** 7, checkpoint=checkpoint, keep=1,
                 save_seconds=min(30, 3 * minutes), **TRAINING)


def fit(network, encoder, diffusion, store, checkpoint: Path, minutes: float) -> list[float]:
    """Train, with a progress bar, unless the checkpoint is of a finished training; load the EMA's weights into network and encoder.
    Returns the loss of each step."""
    saved = files.load(checkpoint) if checkpoint.exists() else None
    if saved is None or saved["progress"] < 1:
        with tqdm(total=100, desc="training", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}") as bar:
            for step in training(network, encoder, diffusion, store, checkpoint, minutes):
                left = step.seconds * (1 / step.progress - 1)
                bar.set_postfix_str(f"{step.phase}, step {step.index}, loss {step.smooth_loss:.4f}, "
                                    f"{step.pictures_per_second:.0f} pictures/s, {left / 60:.1f} min left", refresh=False)
                bar.update(100 * step.progress - bar.n)
        saved = files.load(checkpoint)
    average = torch.nn.ModuleDict({"network": network, "encoder": encoder})
    files.load_into(average, saved["average"])
    average.eval().to("cuda" if torch.cuda.is_available() else "cpu")
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
    """One picture for each name by DDIM, uint8 [B, size, size, 3]."""
    channels, factor = (3, 1) if autoencoder is None else (autoencoder.settings["latent_channels"], autoencoder.factor)
    denoise = guided_denoiser(network, encoder, diffusion, names, guidance, clip=autoencoder is None)
    walk = ddim(denoise, diffusion.schedule, (len(names), channels, size // factor, size // factor), steps,
                generator=torch.Generator().manual_seed(seed), device=next(network.parameters()).device)
    *_, last = tqdm(walk, total=steps, desc=f"sampling {len(names)} dishes", unit="step", disable=not bar)
    return to_pictures(last.x) if autoencoder is None else decoded(autoencoder, last.x)


def held_out_sheet(network, encoder, diffusion, size: int, guidance: float, autoencoder: Autoencoder | None = None, count: int = 12):
    """Held-out dishes, each as sampled and as drawn."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    sampled = sample(network, encoder, diffusion, names, size, guidance=guidance, bar=True, autoencoder=autoencoder)
    real = [draw(name, size, seed=1).transpose(1, 2, 0) for name in names]
    return contact_sheet([list(pair) for pair in zip(sampled, real)], names, columns=3)


def loss_curve(path: Path, losses: list[float]) -> None:
    """The loss of each step and its mean over 100 steps, or fewer of a short training."""
    window = min(100, len(losses))
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(losses, color="lightgrey", linewidth=0.5, label="each step")
    axes.plot(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"), label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"training, {len(losses)} steps")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())


def main(arguments=None) -> int:
    """Draw, train, sample, animate; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m easy_diffusion.demo", description=main.__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    minutes = 2.5 if torch.cuda.is_available() else 10.0
    parser.add_argument("name", nargs="?", default="番茄炒鸡蛋", help="the Chinese name of a dish, such as 土豆牛肉汤 or 砂锅茄子豆腐")
    parser.add_argument("--move", choices=MOVES, default="zoom-out", help="the camera's move")
    parser.add_argument("--out", type=Path, default=Path("out"),
                        help="the folder of the pictures, the drawn dishes and the checkpoint")
    parser.add_argument("--minutes", type=float, default=minutes, help="of training; a finished training is not repeated")
    parser.add_argument("--dishes", type=int, default=DISHES, help="drawn for the training")
    parser.add_argument("--size", type=int, default=argparse.SUPPRESS, help="side of the pictures that the network learns, a multiple of 8 "
                        f"(default: {SIZE}, or {2 * SIZE} with --latent)")
    parser.add_argument("--latent", action="store_true", help="train an autoencoder first, as long again, and the network in its space")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM for a sample, and noise levels of a repaint")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance; 1 is none")
    parser.add_argument("--repaints", type=int, default=4, help="how often the camera moves on to something unpainted")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the GIF")
    parser.add_argument("--fps", type=int, default=20, help="frames a second of the GIF; 10, 20 and 25 are exact in a GIF")
    parser.add_argument("--show", type=int, default=256, help="side of the GIF in pixels; small pictures are enlarged")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that becomes the dish: another seed, another picture")
    options = parser.parse_args(arguments)
    options.size = getattr(options, "size", 2 * SIZE if options.latent else SIZE)
    if options.size % 8 or not 32 <= options.size <= 512:
        parser.error(f"--size is a multiple of 8 from 32 to 512, not {options.size}")
    for option, least in (("minutes", 1e-3), ("dishes", BATCH), ("steps", 1), ("repaints", 1), ("seconds", 0.1), ("fps", 1), ("show", 16)):
        if getattr(options, option) < least:
            parser.error(f"--{option} is {least} or more, not {getattr(options, option)}")
    if options.steps > len(NoiseSchedule.cosine()):
        parser.error(f"--steps is at most 1000, the timesteps of the schedule, not {options.steps}")
    if not 1 <= len(options.name) <= 31 or "/" in options.name:
        parser.error(f"a dish's name has 1 to 31 characters and no slash, not {options.name!r}")
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    start = time.perf_counter()
    torch.manual_seed(0)

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    print(f"{options.name}, {options.move}, on {where}; everything goes to {options.out}/", flush=True)
    try:
        attributes(options.name)
    except ValueError as unknown:
        print(f"note: {unknown} The network has not learned this one; it will do what it can.", flush=True)
    store, autoencoder, suffix = prepare(options.out / f"dishes_{options.size}", options.dishes, options.size), None, f"{options.size}"
    if options.latent:
        store, autoencoder = prepare_latents(store, options.out, options.size, options.minutes)
        suffix += "_latent"
    torch.manual_seed(0)                                                    # whatever was there already, the network begins the same
    network, encoder, diffusion = build("".join(dish_names("train")), autoencoder)
    weights = sum(parameter.numel() for parameter in itertools.chain(network.parameters(), encoder.parameters()))
    print(f"{weights / 1e6:.1f} M weights, for {'latents' if options.latent else 'pictures'} {list(store[0][0].shape)}", flush=True)
    model = options.out / f"model_{suffix}.safetensors"
    losses = fit(network, encoder, diffusion, store, model, options.minutes)
    device = next(network.parameters()).device
    sheet, curve = options.out / f"held_out_{suffix}.png", options.out / f"loss_{suffix}.png"
    newest = model.stat().st_mtime
    if not curve.exists() or curve.stat().st_mtime < newest:
        loss_curve(curve, losses)
    if not sheet.exists() or sheet.stat().st_mtime < newest:
        write_png(sheet, held_out_sheet(network, encoder, diffusion, options.size, options.guidance, autoencoder))

    dish = sample(network, encoder, diffusion, [options.name], options.size, options.steps, options.guidance, options.seed, bar=True,
                  autoencoder=autoencoder)[0]
    write_png(options.out / f"{options.name}.png", contact_sheet([[dish]], [options.name], columns=1, side=options.show))
    # Around a dish there is a table, of which its name says nothing; guided by the name the model would paint slices of more dishes.
    denoise = guided_denoiser(network, encoder, diffusion, [""], guidance=1.0, clip=autoencoder is None)
    how = dict(steps=options.steps, resamples=8, generator=torch.Generator().manual_seed(options.seed),
               watch=partial(tqdm, desc="repainting what the camera uncovers", unit="step", leave=False))
    if autoencoder is None:
        paint = painter(denoise, diffusion.schedule, device=device, **how)
    else:
        paint = latent_painter(denoise, diffusion.schedule, autoencoder, **how)
    film = animate(dish, options.move, paint, options.repaints, options.seconds, options.fps, (options.show, options.show))
    gif = options.out / f"{options.name}_{options.move}.gif"
    write_gif(gif, film, options.fps)
    for path in (gif, options.out / f"{options.name}.png", sheet, curve):
        print(f"wrote {path}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
