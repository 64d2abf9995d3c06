"""Training an autoencoder: a generator that yields every step, so that the caller can log or stop.

Each step encodes a batch x, draws z ~ q(z | x), decodes y = decode(z), and minimizes

    loss = |x - y| + w_squared (x - y)² + w_structure structure(x, y) + w_kl KL / (C·H·W)
           + w_perceptual LPIPS(x, y) - w_adversarial λ D(y)

See autoencoder_losses.py for the terms. The patch discriminator D joins after a given fraction of
the training and has an optimizer of its own (Rombach et al. 2022, section 3.1; Esser et al. 2021).
There is no codebook: a KL divergence of small weight keeps the latents near N(0, I). After the
training `measure_latent_scale` finds the scale and shift that give latents mean 0 and standard
deviation 1, as diffusion needs them.

A checkpoint holds the weights, their exponential moving average, the optimizers, the generator and
the number of steps. A training that was killed resumes from it and, on a CPU and with a loader of
`make_loader`, ends with exactly the weights of an uninterrupted one.

The file needs torch and accelerate and, beside it, autoencoder_losses.py, checkpoint.py,
data_loader.py, distributed.py, ema.py, muon.py, optimizers.py and progress.py; from this package
also files.py and networks/weights_io.py. Its example needs networks/autoencoder.py.

>>> from ..networks.autoencoder import Autoencoder
>>> images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
>>> loader = [(images, ["红", "绿", "蓝", "白"])]
>>> for step in train_autoencoder(Autoencoder((32, 32), blocks=1), loader, steps=2):
...     pass
>>> sorted(step.terms)
['kl', 'reconstruction', 'squared']
>>> scale, shift = measure_latent_scale(step.autoencoder, loader)
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..networks.weights_io import load_weights
from .autoencoder_losses import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    structure_loss,
)
from .checkpoint import load_newest_checkpoint, save_or_warn
from .data_loader import infinite_batches
from .distributed import default_accelerator, warn_on_main_process
from .ema import update_ema
from .optimizers import build_optimizers, set_learning_rates
from .progress import TrainingClock


class AutoencoderStep(NamedTuple):
    """One training step.

    index: number of the step, from 0.
    loss: the autoencoder's loss.
    terms: the terms of the loss without their weights, each a mean over the batch.
        Always: "reconstruction" |x - y|, "squared" (x - y)², "kl" in nats per element of x.
        If they are used: "structure", "perceptual", "adversarial" -D(y) with its weight "lambda" λ,
        and "discriminator", the discriminator's own loss.
    images_per_second: mean speed since the training was started or resumed.
    seconds: training time so far.
    progress: fraction of the training that is done, 0 to 1.
    autoencoder: the autoencoder with the EMA weights, in eval mode.
    """

    index: int
    loss: float
    terms: dict[str, float]
    images_per_second: float
    seconds: float
    progress: float
    autoencoder: torch.nn.Module


def train_autoencoder(
    autoencoder,
    loader,
    *,
    steps: int = 100_000,
    minutes: float | None = None,
    learning_rate: float = 1e-3,
    muon_learning_rate: float | None = None,
    warmup: int = 100,
    decay: float = 0.4,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    clip: float = 1.0,
    squared: float = 4.0,
    structure: float = 0.0,
    kl: float = 1e-4,
    perceptual: Callable | None = None,
    perceptual_weight: float = 1.0,
    discriminator: PatchDiscriminator | None = None,
    discriminator_from: float = 0.5,
    discriminator_learning_rate: float = 2e-4,
    adversarial: float = 0.5,
    seed: int = 0,
    checkpoint=None,
    save_seconds: float = 30,
    accelerator: Accelerator | None = None,
) -> Iterator[AutoencoderStep]:
    """Train an autoencoder and yield every step.

    The training ends after `steps` steps or `minutes` minutes, whichever comes first. What the
    caller does between two steps does not count as training time. Training runs in one process, in
    full precision or bfloat16. A finished training yields no step; its result is in the checkpoint,
    under ["models"]["ema"].

    autoencoder: an Autoencoder; its weights are trained in place.
    loader: (images uint8 [B, C, H, W], captions) batches; it is iterated over repeatedly.
    learning_rate: peak rate of AdamW.
    muon_learning_rate: peak rate of Muon, which then trains the matrices; None for AdamW alone.
    warmup: steps over which the rates rise linearly to their peaks.
    decay: fraction of the training at its end over which the rates fall linearly to 0.
    weight_decay: weight decay of AdamW and Muon.
    ema: decay of the exponential moving average of the weights, below 1.
    clip: largest norm of the gradient; a longer gradient is scaled down to it.
    squared, structure, kl: weights of the terms (x - y)², structure and KL.
    perceptual: (x, y) → [B], a perceptual distance such as LPIPS; None for no such term.
    perceptual_weight: its weight.
    discriminator: D of the adversarial term, trained in place; None for no such term.
    discriminator_from: fraction of the training after which the discriminator joins.
    discriminator_learning_rate: constant rate of its AdamW.
    adversarial: weight of the adversarial term, relative to all other terms; see `adaptive_weight`.
    seed: of the generator that draws z.
    checkpoint: path, written every save_seconds seconds and at the end; if the file exists, the
        training resumes from it.
    accelerator: an Accelerator of one process; None for one with the fastest precision.

    Raises ValueError if the checkpoint belongs to another network or to other optimizers, if the
    loader yields no batch, and for steps, minutes or an accelerator out of range;
    FloatingPointError if the loss or the gradient is not finite.
    """
    # Clock, device and the networks.
    clock = TrainingClock(steps, minutes, save_seconds)
    accelerator = accelerator or default_accelerator()
    if accelerator.num_processes > 1 or accelerator.mixed_precision == "fp16":
        raise ValueError(
            'the training needs one process and mixed precision "bf16" or "no", '
            f'not {accelerator.num_processes} processes and "{accelerator.mixed_precision}"'
        )
    device = accelerator.device
    ema_autoencoder = copy.deepcopy(autoencoder).requires_grad_(False).eval().to(device)
    models = {"autoencoder": autoencoder, "ema": ema_autoencoder}
    weights = list(autoencoder.parameters())
    last_layer = autoencoder.decoder.conv_out.weight
    if isinstance(perceptual, torch.nn.Module):
        perceptual = perceptual.to(device)

    # Optimizers, each with its peak learning rate.
    optimizers_and_rates = build_optimizers(
        weights, learning_rate, muon_learning_rate, weight_decay
    )
    optimizers = [optimizer for optimizer, _ in optimizers_and_rates]
    autoencoder, *optimizers = accelerator.prepare(autoencoder, *optimizers)
    discriminator_optimizers = []
    if discriminator is not None:
        models["discriminator"] = discriminator
        adamw = torch.optim.AdamW(
            discriminator.parameters(), discriminator_learning_rate, betas=(0.5, 0.9)
        )
        discriminator, *discriminator_optimizers = accelerator.prepare(discriminator, adamw)
    discriminator_rates = [
        (optimizer, discriminator_learning_rate) for optimizer in discriminator_optimizers
    ]
    all_optimizers = optimizers + discriminator_optimizers

    # Data and randomness.
    if isinstance(loader, torch.utils.data.DataLoader):
        loader = accelerator.prepare(loader)
    generator = torch.Generator(device).manual_seed(seed)

    # Resume from the checkpoint, if there is one.
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_newest_checkpoint(checkpoint)
        _check_checkpoint(checkpoint, saved, models, all_optimizers)
        for name, model in models.items():
            load_weights(model, saved["models"][name])
        for optimizer, state in zip(all_optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        if saved["device"] == device.type:
            generator.set_state(saved["generator"])
        clock.start(saved["index"], saved["seconds"])
    else:
        clock.start()

    def save():
        if checkpoint is None:
            return
        state = {
            "models": {name: model.state_dict() for name, model in models.items()},
            "index": clock.index,
            "seconds": clock.seconds,
            "optimizers": [optimizer.state_dict() for optimizer in all_optimizers],
            "progress": clock.progress,
            "generator": generator.get_state(),
            "device": device.type,
        }
        warn_on_main_process(accelerator, save_or_warn(checkpoint, state))

    first_index = clock.index
    batches = infinite_batches(loader, first_index)
    while clock.progress < 1:
        # Reconstruct a batch.
        images, _ = next(batches)
        x = images.to(device, non_blocking=True).float() / 127.5 - 1        # [B, C, H, W]
        autoencoder.train()
        y, posterior = autoencoder(x, generator)                            # [B, C, H, W]

        # The loss: reconstruction, KL and, where they are used, structure and perceptual distance.
        terms = {
            "reconstruction": (x - y).abs().mean(),
            "squared": (x - y).square().mean(),
            "kl": posterior.kl().mean() / x[0].numel(),
        }
        loss = terms["reconstruction"] + squared * terms["squared"] + kl * terms["kl"]
        if structure:
            terms["structure"] = structure_loss(x, y).mean()
            loss = loss + structure * terms["structure"]
        if perceptual is not None:
            terms["perceptual"] = perceptual(x, y).mean()
            loss = loss + perceptual_weight * terms["perceptual"]

        # The adversarial term, once the discriminator has joined.
        is_adversarial = discriminator is not None and clock.progress >= discriminator_from
        if is_adversarial:
            discriminator.requires_grad_(False)
            terms["adversarial"] = -discriminator(y).mean()
            terms["lambda"] = adaptive_weight(loss, terms["adversarial"], last_layer)
            loss = loss + adversarial * terms["lambda"] * terms["adversarial"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {clock.index}; "
                f"try a learning_rate below {learning_rate}"
            )

        # Update the autoencoder, the discriminator and the moving average.
        set_learning_rates(optimizers_and_rates, clock.lr_multiplier(warmup, decay))
        set_learning_rates(discriminator_rates, 1.0)
        _optimizer_step(accelerator, loss, weights, optimizers, clip)
        if is_adversarial:
            discriminator.requires_grad_(True).train()
            loss_d = discriminator_loss(discriminator(x), discriminator(y.detach()))
            terms["discriminator"] = loss_d
            _optimizer_step(
                accelerator, loss_d, discriminator.parameters(), discriminator_optimizers, clip
            )
        update_ema(ema_autoencoder, autoencoder, clock.index, ema)

        # Save, and yield the step. The caller's time is not training time.
        clock.tick(len(x))
        if clock.is_save_due():
            save()
        with clock.paused():
            yield AutoencoderStep(
                index=clock.index - 1,
                loss=loss.item(),
                terms={name: term.item() for name, term in terms.items()},
                images_per_second=clock.images_per_second,
                seconds=clock.seconds,
                progress=clock.progress,
                autoencoder=ema_autoencoder,
            )
    if clock.index > first_index:
        save()


def _check_checkpoint(path, saved, models: dict, optimizers: list) -> None:
    """Raise ValueError unless a checkpoint has the same networks and as many optimizers."""
    saved_models = saved.get("models", {}) if isinstance(saved, dict) else {}
    if not {"autoencoder", "ema"} <= saved_models.keys():
        raise ValueError(f"{path} is a checkpoint, but not of an autoencoder's training")
    saved_optimizers = saved["optimizers"]
    if len(saved_optimizers) != len(optimizers) or saved_models.keys() != models.keys():
        raise ValueError(
            f"{path} has the networks {', '.join(saved_models)} and optimizers: "
            f"{len(saved_optimizers)}; this training has the networks {', '.join(models)} "
            f"and optimizers: {len(optimizers)}"
        )


def _optimizer_step(accelerator, loss, weights, optimizers, clip: float) -> None:
    """Compute the gradient of the loss, clip its norm to `clip` and step every optimizer.

    Raises FloatingPointError if the norm is not finite.
    """
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(weights, clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the norm of the gradient is {float(norm)}; try a lower learning rate"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure_latent_scale(autoencoder, loader, max_images: int = 1000) -> tuple[float, float]:
    """Return (scale, shift) such that (z - shift) · scale has mean 0 and standard deviation 1.

    Mean and variance are those of z ~ q(z | x), over all elements of the latents of the first
    `max_images` images. The values are also set as `autoencoder.scale` and `autoencoder.shift`.
    Source: Rombach et al. 2022, section D.1, there without a shift.

    loader: as for `train_autoencoder`.

    Raises ValueError if the loader yields no batch.
    """
    device = next(autoencoder.parameters()).device
    autoencoder.eval()
    count = 0
    total = 0.0                         # Σ E[z]
    total_squared = 0.0                 # Σ E[z²] = Σ (mean² + variance)
    images_left = max_images
    for images, _ in loader:
        images = images[:images_left]
        x = images.to(device).float() / 127.5 - 1
        posterior = autoencoder.encode(x)
        second_moment = posterior.mean.double().square() + posterior.log_variance.double().exp()
        count += posterior.mean.numel()
        total += float(posterior.mean.sum())
        total_squared += float(second_moment.sum())
        images_left -= len(images)
        if images_left <= 0:
            break
    if not count:
        raise ValueError("the loader yields no batch, so there are no latents to measure")
    autoencoder.shift = total / count
    autoencoder.scale = (total_squared / count - autoencoder.shift ** 2) ** -0.5
    return autoencoder.scale, autoencoder.shift
