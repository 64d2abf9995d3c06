"""The training loop, as a generator: it yields every step, and the caller draws, logs or stops.

Each step takes a batch, picks a timestep for each picture, adds that much noise and asks the network about it
(Ho et al. 2020, algorithm 1). Around that stand four habits that make it work:

    caption dropout   some captions become "", so that the same network also learns what «nothing» looks like
                      (Ho & Salimans 2022, algorithm 1)
    EMA               a second set of weights follows the first slowly: ema += (1 - d) (weights - ema), d = min(`ema`,
                      (1 + step) / (10 + step)); it is the one to sample from (Ho et al. 2020, appendix B)
    warm-up, decay    AdamW's rate rises over the first steps and falls to zero over the last part of the run
    AdamW, then SGD   when the loss has stopped falling, plain SGD at a tiny rate settles the weights

accelerate places the work on CPU or GPU and does the mixed precision. The file needs torch, accelerate and, beside it,
batches.py, checkpoint.py and muon.py; its example also schedule.py, samplers.py and diffusion.py.

>>> from .schedule import NoiseSchedule
>>> from .diffusion import GaussianDiffusion
>>> class Network(torch.nn.Conv2d):
...     def forward(self, x_t, t, context, mask): return super().forward(x_t)
>>> pictures = [(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), ["红", "绿", "蓝", "白"])]
>>> diffusion = GaussianDiffusion(NoiseSchedule.cosine(100))
>>> [step.index for step in train(Network(3, 3, 1), diffusion, pictures, steps=3)]
[0, 1, 2]
"""

import copy
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from . import checkpoint as files
from .batches import endless
from .muon import Muon


class TrainingStep(NamedTuple):
    """One step: its number, its loss and what a progress bar wants to say; network and encoder are the EMA's.

    quartiles: the smoothed loss of the timesteps in each quarter of the schedule, the least noise first (nan: none seen yet).
    Of a loss that stands still they tell which part does (Nichol & Dhariwal 2021)."""

    index: int
    loss: float
    smooth_loss: float
    learning_rate: float
    phase: str
    pictures_per_second: float
    seconds: float
    progress: float
    network: torch.nn.Module
    encoder: torch.nn.Module | None
    quartiles: tuple[float, float, float, float]


def fast_precision() -> str:
    """What accelerate calls mixed_precision: "bf16" where this machine computes bfloat16 in hardware, else "no"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has = [getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(has) else "no"


def stopped_falling(losses: list[float], window: int) -> bool:
    """Whether the mean of the last `window` losses is not below that of the window before by more than its standard error."""
    if len(losses) < 2 * window:
        return False
    last, before = losses[-window:], losses[-2 * window:-window]
    error = ((statistics.variance(last) + statistics.variance(before)) / window) ** 0.5
    return statistics.fmean(before) - statistics.fmean(last) < error


def uniform_timesteps(batch: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Each timestep 0 … steps - 1 as likely; int64 [batch], where the generator lives."""
    return torch.randint(steps, (batch,), generator=generator, device=generator.device)


def by_quartile(before, losses: torch.Tensor, t: torch.Tensor, steps: int) -> tuple[float, float, float, float]:
    """`before`, the smoothed loss of each quarter of the schedule, moved a fiftieth towards the losses [B] at t [B]: int64 of
    `steps` timesteps, or float in [0, 1]."""
    shares = (t / steps if not t.is_floating_point() else t).tolist()
    values, after = losses.tolist(), []
    for quarter, value in enumerate(before):
        new = [loss for loss, share in zip(values, shares) if min(int(4 * share), 3) == quarter]
        mean = statistics.fmean(new) if new else value
        after.append(mean if math.isnan(value) else value + (mean - value) / 50)
    return tuple(after)


def train(network, diffusion, loader, encoder=None, *, steps: int = 100_000, minutes: float | None = None,
          learning_rate: float = 1e-4, muon_learning_rate: float | None = None, sgd_learning_rate: float = 1e-6,
          window: int = 2000, warmup: int = 100, decay: float = 0.4, weight_decay: float = 0.01, ema: float = 0.999,
          caption_dropout: float = 0.1, clip: float = 1.0, timesteps=uniform_timesteps, seed: int = 0, checkpoint=None,
          save_seconds: float = 30, accelerator: Accelerator | None = None) -> Iterator[TrainingStep]:
    """Train until `steps` steps or `minutes` minutes are over, whichever is first; yields every step. What the caller does
    between two steps does not count as training time.

    loader gives (pictures uint8 [B, C, H, W] or latents float [B, Z, h, w], captions list[str]), again and again; one by `batches` goes on
    after a break where it was. encoder, if given, is trained with the
    network. muon_learning_rate: if given, Muon trains the matrices, AdamW only the rest. decay: the share of the run over
    which their rates fall to zero. timesteps: (batch, T, generator) → [batch], int64, or float in [0, 1] where time is
    continuous; one with a method `reweighted` weighs the losses, too. checkpoint: a path,
    written every save_seconds seconds and at the end; if it is there already, the run goes on from it. Raises ValueError
    if that file is of another network, for an empty loader, for no time or no steps; FloatingPointError for a loss that is not finite.
    """
    if steps < 1 or (minutes is not None and minutes <= 0):
        raise ValueError(f"a training takes at least a step and some time, not steps={steps}, minutes={minutes}")
    if accelerator is None:     # a process has one precision: whoever made an Accelerator before has chosen it
        accelerator = Accelerator(mixed_precision=None if AcceleratorState._shared_state else fast_precision())
    models = torch.nn.ModuleDict({"network": network} | ({"encoder": encoder} if encoder is not None else {}))
    average = copy.deepcopy(models).requires_grad_(False).eval().to(accelerator.device)
    weights = [parameter for parameter in models.parameters() if parameter.requires_grad]
    matrices = [weight for weight in weights if weight.ndim > 1] if muon_learning_rate else []
    others = [weight for weight in weights if weight.ndim < 2] if muon_learning_rate else weights
    adamw = torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    muon = [Muon(matrices, muon_learning_rate, weight_decay=weight_decay)] if matrices else []
    sgd = torch.optim.SGD(weights, sgd_learning_rate)
    network, encoder, adamw, sgd, *muon = accelerator.prepare(network, encoder, adamw, sgd, *muon)
    if isinstance(loader, torch.utils.data.DataLoader):
        loader = accelerator.prepare(loader)
    generator = torch.Generator(accelerator.device).manual_seed(seed)
    index, phase, losses, before = 0, "adamw", [], 0.0
    if checkpoint is not None and Path(checkpoint).exists():
        saved = files.load(checkpoint)
        files.load_into(models, saved["models"])
        files.load_into(average, saved["average"])
        if len(saved["optimizers"]) != len([adamw, *muon]):
            raise ValueError(f"{checkpoint} was trained {'without' if muon else 'with'} Muon, so muon_learning_rate must tell the same")
        for optimizer, state in zip([adamw, *muon], saved["optimizers"]):
            optimizer.load_state_dict(state)
        if saved["predicts"] != diffusion.predicts:
            raise ValueError(f"{checkpoint} was trained to predict {saved['predicts']}, not {diffusion.predicts}")
        if saved["device"] == accelerator.device.type:
            generator.set_state(saved["generator"])
        index, phase, losses, before = (saved[key] for key in ("index", "phase", "losses", "seconds"))

    def save():
        if checkpoint is not None and accelerator.is_main_process:
            files.save(checkpoint, {
                "models": models.state_dict(), "average": average.state_dict(), "generator": generator.get_state(), "index": index,
                "optimizers": [optimizer.state_dict() for optimizer in (adamw, *muon)], "phase": phase, "losses": losses,
                "seconds": seconds, "progress": progress(), "predicts": diffusion.predicts, "device": accelerator.device.type})

    def progress():
        return max(index / steps, seconds / (60 * minutes) if minutes else 0.0)

    start, seconds, saved_at, first = time.perf_counter(), before, before, index
    smooth = statistics.fmean(losses[-100:]) if losses else None
    seen, batches, quartiles = 0, endless(loader, index), (math.nan,) * 4
    while progress() < 1:
        pictures, captions = next(batches)
        x0 = pictures.to(accelerator.device, non_blocking=True).float()     # [B, C, H, W]
        if pictures.dtype == torch.uint8:                                   # latents are floats already
            x0 = x0 / 127.5 - 1
        t = timesteps(len(x0), len(diffusion), generator)                   # [B]
        context = mask = None
        models.train()
        if encoder is not None:
            dropped = torch.rand(len(x0), generator=generator, device=generator.device) < caption_dropout
            context, mask = encoder(["" if drop else caption for drop, caption in zip(dropped.tolist(), captions)])
        each = diffusion.loss(network, x0, t, context, mask, generator)     # [B]
        loss = (timesteps.reweighted(t, each) if hasattr(timesteps, "reweighted") else each).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {index}; a lower learning_rate than {learning_rate} may help")
        factor = min(1, (index + 1) / max(warmup, 1)) * min(1, (1 - progress()) / max(decay, 1e-9))
        optimizers, rate = ([adamw, *muon], factor * learning_rate) if phase == "adamw" else ([sgd], sgd_learning_rate)
        for optimizer, peak in zip([adamw, *muon], (learning_rate, muon_learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = factor * peak
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        follow = 1 - min(ema, (1 + index) / (10 + index))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in models.parameters()], follow)
        losses.append(loss.item())
        quartiles = by_quartile(quartiles, each.detach(), t, len(diffusion))
        smooth = losses[-1] if smooth is None else 0.98 * smooth + 0.02 * losses[-1]
        index, seen, seconds = index + 1, seen + len(x0), before + time.perf_counter() - start
        taken = phase
        if phase == "adamw" and index % 100 == 0 and stopped_falling(losses, window):
            phase = "sgd"
        if seconds - saved_at > save_seconds:
            save()
            saved_at = seconds
        paused = time.perf_counter()
        yield TrainingStep(index - 1, losses[-1], smooth, rate, taken,
                           seen / max(seconds - before, 1e-9), seconds, min(progress(), 1.0), average["network"],
                           average["encoder"] if "encoder" in average else None, quartiles)
        start += time.perf_counter() - paused                               # the caller's time is not training time
    if index > first:
        save()
