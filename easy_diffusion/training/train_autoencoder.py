"""The autoencoder's training, as a generator: it yields every step, and the caller draws, measures or stops.

Each step takes a batch, encodes it, draws z ~ q(z | x) and decodes it; the terms of autoencoder_loss.py say how far the picture is from
what it was. From a given share of the run on, a patch discriminator learns beside it, with an optimizer of its own, what is still wrong,
and the autoencoder learns from its opinion (Rombach et al. 2022, section 3.1; Esser et al. 2021). There is no codebook: a KL of tiny weight
keeps the latents near N(0, I), and `measure_latents` finds what scale and shift are left, for diffusion.

A broken run goes on where it was: weights, both optimizers, the average, the generator, and, with a loader of `batches`, the place within
the epoch. On a CPU the weights are then those of an unbroken run, to the bit. The file needs torch, accelerate and, beside it, batches.py,
checkpoint.py, muon.py, run.py and autoencoder_loss.py; its example also autoencoder.py and blocks.py.

>>> from .autoencoder import Autoencoder
>>> pictures = [(torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), ["红", "绿", "蓝", "白"])]
>>> for step in train_autoencoder(Autoencoder((32, 32), blocks=1), pictures, steps=2): pass
>>> sorted(step.terms)
['kl', 'reconstruction', 'squared']
>>> scale, shift = measure_latents(step.autoencoder, pictures)
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..networks.weights_io import load_weights
from .autoencoder_losses import PatchDiscriminator, adaptive_weight, discriminator_loss, structure_loss
from .checkpoint import load_newest_checkpoint, save_or_warn
from .data_loader import infinite_batches
from .distributed import default_accelerator, warn_on_main_process
from .ema import update_ema
from .optimizers import build_optimizers, set_learning_rates
from .progress import TrainingClock


class AutoencoderStep(NamedTuple):
    """One step: its number, its loss and the loss's terms, each a mean over the batch before its weight; autoencoder is the average.

    terms: "reconstruction", "squared", "kl" (nats for each number of the picture) and, where they are in use, "structure", "perceptual",
    "adversarial", "discriminator" and "lambda", the weight that makes the adversarial term pull as strongly as all others."""

    index: int
    loss: float
    terms: dict[str, float]
    images_per_second: float
    seconds: float
    progress: float
    autoencoder: torch.nn.Module


def train_autoencoder(autoencoder, loader, *, steps: int = 100_000, minutes: float | None = None, learning_rate: float = 1e-3,
                      muon_learning_rate: float | None = None, warmup: int = 100, decay: float = 0.4, weight_decay: float = 0.01,
                      ema: float = 0.999, clip: float = 1.0, squared: float = 4.0, structure: float = 0.0, kl: float = 1e-4,
                      perceptual: Callable | None = None, perceptual_weight: float = 1.0, discriminator: PatchDiscriminator | None = None,
                      discriminator_from: float = 0.5, discriminator_learning_rate: float = 2e-4, adversarial: float = 0.5, seed: int = 0,
                      checkpoint=None, save_seconds: float = 30, accelerator: Accelerator | None = None) -> Iterator[AutoencoderStep]:
    """Train until `steps` steps or `minutes` minutes are over, whichever is first; yields every step. What the caller does between two
    steps does not count as training time.

    loader gives (pictures uint8 [B, C, H, W], captions), again and again. squared, structure, kl, perceptual_weight, adversarial: the
    weights of the terms; KL is counted for each number of the picture. perceptual: (x, y) → [B], such as LPIPS. discriminator: joins after
    the share discriminator_from of the run. muon_learning_rate: if given, Muon trains the autoencoder's matrices. checkpoint: a path,
    written every save_seconds seconds and at the end; if it is there, the run goes on from it. Raises ValueError if that file is of another
    network, or of a run with another number of optimizers, for an empty loader, for no time or no steps; FloatingPointError for a loss that
    is not finite. It trains in one process, in full precision or bfloat16. A run that is finished yields nothing; what came out of it
    stands in the checkpoint, under "models", "average".
    """
    clock, accelerator = TrainingClock(steps, minutes, save_seconds), accelerator or default_accelerator()
    if accelerator.num_processes > 1 or accelerator.mixed_precision == "fp16":
        raise ValueError(f"one process, and mixed precision bf16 or no; not {accelerator.num_processes} and {accelerator.mixed_precision}")
    device, average = accelerator.device, copy.deepcopy(autoencoder).requires_grad_(False).eval().to(accelerator.device)
    weights, last = list(autoencoder.parameters()), autoencoder.decoder.conv_out.weight
    rated = build_optimizers(weights, learning_rate, muon_learning_rate, weight_decay)
    optimizers = [optimizer for optimizer, _ in rated]
    models, judges = {"autoencoder": autoencoder, "ema": average}, []
    autoencoder, *optimizers = accelerator.prepare(autoencoder, *optimizers)
    perceptual = perceptual.to(device) if isinstance(perceptual, torch.nn.Module) else perceptual
    if discriminator is not None:
        models["discriminator"] = discriminator
        discriminator, *judges = accelerator.prepare(
            discriminator, torch.optim.AdamW(discriminator.parameters(), discriminator_learning_rate, betas=(0.5, 0.9)))
    if isinstance(loader, torch.utils.data.DataLoader):
        loader = accelerator.prepare(loader)
    generator = torch.Generator(device).manual_seed(seed)
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_newest_checkpoint(checkpoint)
        if not isinstance(saved, dict) or not {"autoencoder", "ema"} <= saved.get("models", {}).keys():
            raise ValueError(f"{checkpoint} is a checkpoint, but not one of an autoencoder's training")
        if len(saved["optimizers"]) != len(optimizers + judges) or saved["models"].keys() != models.keys():
            raise ValueError(f"{checkpoint} is of a run with {', '.join(saved['models'])} and {len(saved['optimizers'])} optimizers; this "
                             f"one has {', '.join(models)} and {len(optimizers + judges)}")
        for name, model in models.items():
            load_weights(model, saved["models"][name])
        for optimizer, state in zip(optimizers + judges, saved["optimizers"]):
            optimizer.load_state_dict(state)
        if saved["device"] == device.type:
            generator.set_state(saved["generator"])
        clock.start(saved["index"], saved["seconds"])
    else:
        clock.start()

    def save():
        if checkpoint is not None:
            warn_on_main_process(accelerator, save_or_warn(checkpoint, {
                "models": {name: model.state_dict() for name, model in models.items()}, "index": clock.index, "seconds": clock.seconds,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers + judges], "progress": clock.progress,
                "generator": generator.get_state(), "device": device.type}))

    first, batches = clock.index, infinite_batches(loader, clock.index)
    while clock.progress < 1:
        pictures, _ = next(batches)
        x = pictures.to(device, non_blocking=True).float() / 127.5 - 1      # [B, C, H, W] in [-1, 1]
        set_learning_rates(rated, clock.lr_multiplier(warmup, decay))
        set_learning_rates([(judge, discriminator_learning_rate) for judge in judges], 1.0)
        autoencoder.train()
        y, posterior = autoencoder(x, generator)                            # [B, C, H, W]
        terms = {"reconstruction": (x - y).abs().mean(), "squared": (x - y).square().mean(), "kl": posterior.kl().mean() / x[0].numel()}
        loss = terms["reconstruction"] + squared * terms["squared"] + kl * terms["kl"]
        if structure:
            terms["structure"] = structure_loss(x, y).mean()
            loss = loss + structure * terms["structure"]
        if perceptual is not None:
            terms["perceptual"] = perceptual(x, y).mean()
            loss = loss + perceptual_weight * terms["perceptual"]
        judging = discriminator is not None and clock.progress >= discriminator_from
        if judging:
            discriminator.requires_grad_(False)
            terms["adversarial"] = -discriminator(y).mean()
            terms["lambda"] = adaptive_weight(loss, terms["adversarial"], last)
            loss = loss + adversarial * terms["lambda"] * terms["adversarial"]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {clock.index}; a lower learning_rate than {learning_rate} may "
                                     "help")
        _optimizer_step(accelerator, loss, weights, optimizers, clip)
        if judging:
            discriminator.requires_grad_(True).train()
            terms["discriminator"] = discriminator_loss(discriminator(x), discriminator(y.detach()))
            _optimizer_step(accelerator, terms["discriminator"], discriminator.parameters(), judges, clip)
        update_ema(average, autoencoder, clock.index, ema)
        clock.tick(len(x))
        if clock.is_save_due():
            save()
        with clock.paused():                                               # the caller's time is not training time
            yield AutoencoderStep(clock.index - 1, loss.item(), {name: term.item() for name, term in terms.items()},
                                  clock.images_per_second, clock.seconds, clock.progress, average)
    if clock.index > first:
        save()


def _optimizer_step(accelerator, loss, weights, optimizers, clip):
    """One step of the optimizers down the loss, along a gradient of at most the length `clip`. FloatingPointError if that is not finite."""
    accelerator.backward(loss)
    length = accelerator.clip_grad_norm_(weights, clip)
    if not torch.isfinite(length):
        raise FloatingPointError(f"the gradient's length is {float(length)}; a lower learning rate may help")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure_latent_scale(autoencoder, loader, max_images: int = 1000) -> tuple[float, float]:
    """The scale and shift of an autoencoder with which the latents of these pictures have mean 0 and deviation 1 over all their numbers;
    they become the autoencoder's. loader: see train_autoencoder; of its pictures the first `pictures` are looked at."""
    count = total = squares = 0.0
    for x, _ in loader:
        x = x[:max_images]
        posterior = autoencoder.eval().encode(x.to(next(autoencoder.parameters()).device).float() / 127.5 - 1)
        count, total = count + posterior.mean.numel(), total + float(posterior.mean.sum())
        squares += float((posterior.mean.double().square() + posterior.log_variance.double().exp()).sum())
        max_images -= len(x)
        if max_images <= 0:
            break
    if not count:
        raise ValueError("the loader gives no batch, so there are no latents to measure")
    autoencoder.shift = total / count
    autoencoder.scale = (squares / count - autoencoder.shift ** 2) ** -0.5
    return autoencoder.scale, autoencoder.shift
