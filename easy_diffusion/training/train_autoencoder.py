"""Training an autoencoder: a generator that yields every step, so that the caller can log or stop.

Each step encodes a batch x, draws z ~ q(z | x), decodes y = decode(z), and minimizes

    loss = |x - y| + w_squared (x - y)² + w_structure structure(x, y) + w_kl KL / (C·H·W)
           + w_perceptual perceptual(x, y) - w_adversarial λ D(y)

See autoencoder_losses.py for the terms. The patch discriminator D joins after a given fraction of
the training and has an optimizer of its own (Rombach et al. 2022, section 3.1; Esser et al. 2021).
There is no codebook: a KL divergence of small weight keeps the latents near N(0, I). After the
training `measure_latent_scale` finds the scale and shift that give latents mean 0 and standard
deviation 1, as diffusion needs them.

A checkpoint holds the weights, their exponential moving average, the optimizers, the generator and
the number of steps. A training that was killed resumes from it and, on a CPU and with a loader of
`make_loader`, ends with exactly the weights of an uninterrupted one.

The file needs torch and accelerate and, beside it, autoencoder_losses.py, checkpoint.py, clock.py,
data_loader.py, distributed.py, ema.py, lock.py, muon.py, optimizers.py and options.py; from this
package also diffusion/ and networks/. Its example needs networks/autoencoder.py.

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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..networks.weights_io import load_weights
from .autoencoder_losses import (
    adaptive_weight,
    build_perceptual,
    discriminator_loss,
    structure_loss,
)
from .checkpoint import load_newest_checkpoint, save_or_warn
from .clock import TrainingClock
from .data_loader import infinite_batches, normalize_pixels, prepare_loader, unpack_batch
from .distributed import default_accelerator, warn_on_main_process
from .ema import EMA
from .lock import locked
from .optimizers import build_optimizers, descend, set_learning_rates
from .options import AutoencoderOptions, replace_options


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


class AutoencoderTrainer:
    """An autoencoder, its EMA, its optimizers, and everything else that a checkpoint holds.

    autoencoder, loader: see `train_autoencoder`.
    options: AutoencoderOptions.

    `run` is the loop; the methods after it are its parts.
    """

    def __init__(self, autoencoder, loader, options: AutoencoderOptions):
        self.options = options
        run = options.run
        self.clock = TrainingClock(run.steps, run.minutes, options.save_seconds)

        # Device and precision.
        self.accelerator = options.accelerator or default_accelerator()
        check_accelerator(self.accelerator)
        self.device = self.accelerator.device
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)   # for fp16
        self.loader = prepare_loader(self.accelerator, loader)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.perceptual = build_perceptual(options.reconstruction.perceptual)
        if isinstance(self.perceptual, torch.nn.Module):
            self.perceptual = self.perceptual.to(self.device)

        # The models, and their optimizers with their peak learning rates.
        ema_autoencoder = copy.deepcopy(autoencoder).requires_grad_(False).eval().to(self.device)
        self.models = {"autoencoder": autoencoder, "ema": ema_autoencoder}
        self.autoencoder = self.accelerator.prepare(autoencoder)
        self.ema = EMA(ema_autoencoder, autoencoder, options.optimizer.ema)
        self.optimizers = build_optimizers(
            list(autoencoder.parameters()),
            options.optimizer.learning_rate,
            options.optimizer.muon_learning_rate,
            options.optimizer.weight_decay,
        )
        self.discriminator = options.adversary.discriminator
        self.discriminator_optimizers = []
        if self.discriminator is not None:
            self.models["discriminator"] = self.discriminator
            self.discriminator = self.accelerator.prepare(self.discriminator)
            rate = options.adversary.discriminator_learning_rate
            adamw = torch.optim.AdamW(self.discriminator.parameters(), rate, betas=(0.5, 0.9))
            self.discriminator_optimizers = [(adamw, rate)]
        self.all_optimizers = [
            optimizer for optimizer, _ in self.optimizers + self.discriminator_optimizers
        ]

    def run(self) -> Iterator[AutoencoderStep]:
        """Train until the steps or the minutes are over; yield every step."""
        self.restore()
        first_index = self.clock.index
        batches = infinite_batches(self.loader, first_index)
        while self.clock.progress < 1:
            # Reconstruct a batch.
            images = unpack_batch(next(batches)).images
            x = normalize_pixels(images.to(self.device, non_blocking=True))     # [B, C, H, W]
            self.autoencoder.train()
            y, posterior = self.autoencoder(x, self.generator)                  # [B, C, H, W]

            # Update the autoencoder, the discriminator and the moving average.
            loss, terms = self.compute_loss(x, y, posterior)
            loss = self.update_autoencoder(loss)
            if "adversarial" in terms:
                terms["discriminator"] = self.update_discriminator(x, y.detach())
            self.ema.update(self.clock.index)

            # Save, and yield the step. The caller's time is not training time.
            self.clock.tick(len(x))
            if self.clock.is_save_due():
                self.save()
            with self.clock.paused():
                yield self.describe_step(loss, terms)
        if self.clock.index > first_index:
            self.save()

    def restore(self) -> None:
        """Load the checkpoint, if there is one."""
        path = self.options.checkpoint
        self.clock.start()
        if path is None or not Path(path).exists():
            return
        saved = load_newest_checkpoint(path)
        check_checkpoint(path, saved, self.models, self.all_optimizers)
        for name, model in self.models.items():
            load_weights(model, saved["models"][name])
        for optimizer, state in zip(self.all_optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        if saved["device"] == self.device.type:
            self.generator.set_state(saved["generator"])
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.clock.start(saved["index"], saved["seconds"])

    def compute_loss(self, x, y, posterior) -> tuple[torch.Tensor, dict]:
        """Return the loss of a batch x [B, C, H, W] and its reconstruction y, and its terms."""
        options = self.options.reconstruction
        terms = {
            "reconstruction": (x - y).abs().mean(),
            "squared": (x - y).square().mean(),
            "kl": posterior.kl().mean() / x[0].numel(),
        }
        loss = terms["reconstruction"] + options.squared * terms["squared"]
        loss = loss + options.kl * terms["kl"]
        if options.structure:
            terms["structure"] = structure_loss(x, y).mean()
            loss = loss + options.structure * terms["structure"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x, y).mean()
            loss = loss + options.perceptual_weight * terms["perceptual"]

        # The adversarial term, once the discriminator has joined.
        adversary = self.options.adversary
        if self.discriminator is not None and self.clock.progress >= adversary.discriminator_from:
            self.discriminator.requires_grad_(False)
            last_layer = self.models["autoencoder"].decoder.conv_out.weight
            terms["adversarial"] = -self.discriminator(y).mean()
            terms["lambda"] = adaptive_weight(loss, terms["adversarial"], last_layer)
            loss = loss + adversary.adversarial * terms["lambda"] * terms["adversarial"]
        return loss, terms

    def update_autoencoder(self, loss: torch.Tensor) -> float:
        """Take the optimizer step of the autoencoder; return the loss."""
        run = self.options.run
        lr_multiplier = self.clock.lr_multiplier(run.warmup, run.decay)
        set_learning_rates(self.optimizers, lr_multiplier)
        weights = list(self.models["autoencoder"].parameters())
        clip = self.options.optimizer.clip
        return descend(loss, weights, self.optimizers, clip, self.clock.index, self.scaler)

    def update_discriminator(self, x, y) -> torch.Tensor:
        """Take the optimizer step of the discriminator; return its loss."""
        self.discriminator.requires_grad_(True).train()
        loss = discriminator_loss(self.discriminator(x), self.discriminator(y))
        set_learning_rates(self.discriminator_optimizers, 1.0)
        weights = list(self.models["discriminator"].parameters())
        clip = self.options.optimizer.clip
        optimizers = self.discriminator_optimizers
        descend(loss, weights, optimizers, clip, self.clock.index, self.scaler)
        return loss

    def save(self) -> None:
        """Write the checkpoint; warn if the disk refuses it."""
        if self.options.checkpoint is None:
            return
        state = {
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "index": self.clock.index,
            "seconds": self.clock.seconds,
            "optimizers": [optimizer.state_dict() for optimizer in self.all_optimizers],
            "progress": self.clock.progress,
            "generator": self.generator.get_state(),
            "device": self.device.type,
            "scaler": self.scaler.state_dict(),
        }
        warn_on_main_process(self.accelerator, save_or_warn(self.options.checkpoint, state))

    def describe_step(self, loss: float, terms: dict) -> AutoencoderStep:
        """Return what `run` yields."""
        return AutoencoderStep(
            index=self.clock.index - 1,
            loss=loss,
            terms={name: term.item() for name, term in terms.items()},
            images_per_second=self.clock.images_per_second,
            seconds=self.clock.seconds,
            progress=self.clock.progress,
            autoencoder=self.models["ema"],
        )


def check_accelerator(accelerator) -> None:
    """Raise ValueError for several processes."""
    if accelerator.num_processes > 1:
        raise ValueError(
            f"the training needs one process, not {accelerator.num_processes} processes"
        )


def check_checkpoint(path, saved, models: dict, optimizers: list) -> None:
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


def train_autoencoder(autoencoder, loader, **options) -> Iterator[AutoencoderStep]:
    """Train an autoencoder and yield every step.

    The training ends after `steps` steps or `minutes` minutes, whichever comes first. What the
    caller does between two steps does not count as training time. Training runs in one process. A
    finished training yields no step; its result is in the checkpoint, under ["models"]["ema"].

    autoencoder: an Autoencoder; its weights are trained in place.
    loader: (images uint8 [B, C, H, W], captions) batches; it is iterated over repeatedly.
    options: the fields of AutoencoderOptions and of its groups in options.py, such as steps=1000,
        learning_rate=1e-3, structure=0.3.

    Raises TypeError for an unknown option; ValueError if the checkpoint belongs to another network
    or to other optimizers, if the loader yields no batch, and for steps, minutes or an accelerator
    out of range; BlockingIOError if another training writes to the checkpoint; FloatingPointError
    if the loss or the gradient is not finite.
    """
    options = replace_options(AutoencoderOptions(), **options)
    trainer = AutoencoderTrainer(autoencoder, loader, options)
    yield from locked(trainer.run(), options.checkpoint, trainer.accelerator)


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
        mean, log_variance = posterior.mean.cpu(), posterior.log_variance.cpu()
        second_moment = mean.double().square() + log_variance.double().exp()
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
