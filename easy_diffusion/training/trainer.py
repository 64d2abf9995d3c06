"""The training loop, as a generator: it yields every step, and the caller draws, logs or stops.

Each step takes a batch, picks a timestep for each picture, adds that much noise and asks the network about it (Ho et al. 2020,
algorithm 1). Around that stand habits that make it work:

    caption dropout   some captions become "", so that the network also learns what «nothing» looks like (Ho & Salimans 2022, algorithm 1)
    EMA               a second set of weights follows the first slowly; it is the one to sample from (Ho et al. 2020, appendix B)
    warm-up, decay    AdamW's rate rises over the first steps and falls to zero over the last part of the run
    AdamW, then SGD   when the loss has stopped falling, plain SGD at a tiny rate settles the weights
    micro_batches            a batch that is too large for the memory goes through the network piece by piece; the gradients add up
    skipping          a step that is not finite, or a spike, is not taken (health.py)

All chance of step i follows from (seed, i): timesteps, dropped captions, noise, and what the network itself throws dice for. It is drawn
for the batches of all processes, and each takes its share; so two processes learn what one with the double batch does (on a GPU with other
noise), and a run of so many steps, not minutes, that was killed goes on, with a loader of `batches`, to the weights of one that was not: on
a CPU to the bit.

accelerate knows device, precision and the other processes. The file needs torch and accelerate and, beside it, batches.py,
checkpoint.py, health.py, muon.py and run.py; its example also schedule.py, samplers.py and diffusion.py.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..diffusion.timesteps import uniform_timesteps
from ..networks.weights_io import load_weights
from .checkpoint import check_compatible, load_newest_checkpoint, save_or_warn
from .data_loader import ResumableBatchSampler, derive_seed, fork_rng, images_per_step, infinite_batches
from .distributed import (
    any_rank,
    average_gradients,
    broadcast_parameters,
    check_same_step,
    default_accelerator,
    reduce_metrics,
    warn_on_main_process,
)
from .ema import update_ema
from .health import TrainingHealth, explain_failure
from .memory import OUT_OF_MEMORY, catch_out_of_memory
from .optimizers import build_optimizers, clip_grad_norm, has_plateaued, set_learning_rates
from .progress import TrainingClock


class TrainingStep(NamedTuple):
    """One step: its number, its loss and what a progress bar wants to say; network and encoder are the EMA's.

    quartiles: the smoothed loss of the timesteps in each quarter of the schedule, the least noise first (nan: none seen yet).
    Of a loss that stands still they tell which part does (Nichol & Dhariwal 2021). gradient_norm: before it was clipped. skipped: steps so
    far that were not taken; such a step's loss is not in smooth_loss. note: what a log should keep, "" at most steps."""

    index: int
    loss: float
    smooth_loss: float
    learning_rate: float
    phase: str
    images_per_second: float
    seconds: float
    progress: float
    network: torch.nn.Module
    encoder: torch.nn.Module | None
    quartiles: tuple[float, float, float, float]
    gradient_norm: float = math.nan
    skipped: int = 0
    note: str = ""


def update_quartile_losses(before, losses: torch.Tensor, t: torch.Tensor, steps: int) -> tuple[float, float, float, float]:
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
          window: int = 2000, plateaued: Callable[[list[float], int], bool] = has_plateaued, phase: str = "adamw", warmup: int = 100,
          decay: float = 0.4, weight_decay: float = 0.01, ema: float = 0.999, caption_dropout: float = 0.1, clip: float = 1.0,
          timesteps=uniform_timesteps, micro_batches: int = 1, compile: bool = False, patience: int = 5, spike: float = 20.0, seed: int = 0,
          checkpoint=None, keep: int = 2, save_seconds: float = 30, accelerator: Accelerator | None = None) -> Iterator[TrainingStep]:
    """Train until `steps` steps or `minutes` minutes are over, whichever is first; yields every step. What the caller does
    between two steps does not count as training time.

    loader gives (pictures uint8 [B, C, H, W] or latents float [B, Z, h, w], captions list[str]), again and again; one by `batches` goes on
    after a break where it was, and in several processes gives each its share. encoder, if given, is trained with the network.

    learning_rate, decay, weight_decay: AdamW's, the share of the run over which the rate falls to zero. muon_learning_rate: if given, Muon
    trains the matrices, AdamW only the rest. phase: with what to begin; "adamw" gives way to "sgd" as soon as plateaued(losses, window),
    which is asked every 100 steps, is true. timesteps: (batch, T, generator) → [batch], int64, or float in [0, 1] where time is continuous;
    one with methods `weights` and `remember` weighs the losses, too. micro_batches: parts of a batch that go through the network one by one.
    patience, spike: Guard's.

    checkpoint: a path, written every save_seconds seconds and at the end; if it is there already, the run goes on from it. keep: how many
    stay, see checkpoint.save; from two on also the one of the lowest loss over `window` steps, as path.best. Raises ValueError if that file
    is of another network, for an empty loader, for no time or no steps; FloatingPointError where the steps will not become finite again.
    """
    clock, accelerator = TrainingClock(steps, minutes, save_seconds), accelerator or default_accelerator()
    device, process, processes, scaler = accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator.scaler
    models = torch.nn.ModuleDict({"network": network} | ({"encoder": encoder} if encoder is not None else {})).to(device)
    broadcast_parameters(accelerator, models)
    average = copy.deepcopy(models).requires_grad_(False).eval()
    ask = torch.compile(network) if compile else network
    weights = [parameter for parameter in models.parameters() if parameter.requires_grad]
    adaptive = build_optimizers(weights, learning_rate, muon_learning_rate, weight_decay)
    settling = [(torch.optim.SGD(weights, sgd_learning_rate), sgd_learning_rate)]       # without momentum it has nothing to remember
    if isinstance(loader, DataLoader) and not isinstance(loader.batch_sampler, ResumableBatchSampler):
        loader = accelerator.prepare(loader)
    health, generator = TrainingHealth(average, patience, spike=spike), torch.Generator(device)
    others = {"health": health, "scaler": scaler, "timesteps": timesteps}
    others = {name: other for name, other in others.items() if hasattr(other, "state_dict")}
    losses, smooth, quartiles, lowest, halved, together = [], math.nan, (math.nan,) * 4, math.inf, False, images_per_step(loader, processes)
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_newest_checkpoint(checkpoint)
        check_compatible(checkpoint, saved, adaptive, diffusion.prediction_type, together)
        load_weights(models, saved["models"])
        load_weights(average, saved["ema"])
        for (optimizer, _), state in zip(adaptive, saved["optimizers"]):
            optimizer.load_state_dict(state)
        for name in others.keys() & saved.keys():
            others[name].load_state_dict(saved[name])
        phase, losses, smooth, quartiles, lowest = (saved[key] for key in ("phase", "losses", "smooth_loss", "quartile_losses", "lowest_loss"))
        if saved["micro_batches_doubled"]:                                                 # unless more micro_batches are asked for now
            micro_batches, halved = max(micro_batches, saved["micro_batches"]), micro_batches <= saved["micro_batches"]
        clock.start(saved["index"], saved["seconds"])
    check_same_step(accelerator, checkpoint, clock.index)

    def save() -> str:
        nonlocal lowest
        if checkpoint is None or not accelerator.is_main_process:
            return ""
        level = statistics.fmean(losses[-window:]) if losses else math.inf
        told = save_or_warn(checkpoint, {
            "models": models.state_dict(), "ema": average.state_dict(), "index": clock.index, "phase": phase, "losses": losses,
            "optimizers": [optimizer.state_dict() for optimizer, _ in adaptive], "seconds": clock.seconds, "progress": clock.progress,
            "prediction_type": diffusion.prediction_type, "smooth_loss": smooth, "quartile_losses": quartiles, "lowest_loss": min(level, lowest), "micro_batches": micro_batches,
            "micro_batches_doubled": halved, "images_per_step": together} | {name: other.state_dict() for name, other in others.items()}, keep, level < lowest)
        lowest = lowest if told else min(level, lowest)
        return told

    def learn(pictures, captions):
        """The loss of each picture of a batch, its timestep and its weight, [B] each; the gradient of their mean is left in the weights."""
        for weight in weights:
            weight.grad = None
        generator.manual_seed(derive_seed(seed, clock.index))
        count = len(pictures)
        mine, size = slice(process * count, (process + 1) * count), -(-count // micro_batches)
        with fork_rng(derive_seed(seed, clock.index)):
            t = timesteps(count * processes, len(diffusion), generator)[mine]               # [B]
        dropped = torch.rand(count * processes, generator=generator, device=device)[mine] < caption_dropout
        if encoder is not None:
            captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions)]
        weight = timesteps.weights(t).to(device) if hasattr(timesteps, "weights") else torch.ones(count, device=device)
        if device.type == "cpu":                                            # past the noise of those before us; elsewhere it has its own
            torch.randn(process * count, *pictures.shape[1:], generator=generator)
        else:
            generator.manual_seed(derive_seed(seed, clock.index, process))
        each, context, mask = [], None, None
        with fork_rng(derive_seed(seed, clock.index, process)):
            for part in (slice(first, first + size) for first in range(0, count, size)):
                x0 = pictures[part].to(device, non_blocking=True).float()   # [P, C, H, W]
                x0 = x0 / 127.5 - 1 if pictures.dtype == torch.uint8 else x0                    # latents are floats already
                with accelerator.autocast():
                    if encoder is not None:
                        context, mask = encoder(captions[part])             # [P, L, D], [P, L]
                    each.append(diffusion.loss(ask, x0, t[part], context, mask, generator))         # [P]
                share = (each[-1] * weight[part].to(x0)).sum() / count
                (share if scaler is None else scaler.scale(share)).backward()
                each[-1] = each[-1].detach()
        return torch.cat(each), t, weight

    began, data = clock.index, infinite_batches(loader, clock.index, process, processes)
    while clock.progress < 1:
        (pictures, captions), index, taken, note = next(data), clock.index, phase, ""
        models.train()
        while any_rank(accelerator, (found := catch_out_of_memory(learn, pictures, captions)) is None):
            if halved:
                raise torch.OutOfMemoryError(f"{OUT_OF_MEMORY} at step {index} in {micro_batches} micro_batches, too: take a smaller batch")
            micro_batches, halved = 2 * micro_batches, True
            note = warn_on_main_process(accelerator, f"{OUT_OF_MEMORY} at step {index}; from here on the {len(pictures)} pictures of a batch go through "
                            f"the network in {micro_batches} micro_batches, whose gradients add up")
        each, t, weight = found
        average_gradients(accelerator, weights)
        optimizers = adaptive if phase == "adamw" else settling
        for optimizer, _ in optimizers if scaler is not None else ():
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        loss, norm, seconds = reduce_metrics(accelerator, (each * weight).mean(), norm, clock.now())
        set_learning_rates(adaptive, clock.lr_multiplier(warmup, decay) * health.lr_scale)
        set_learning_rates(settling, health.lr_scale)
        if not (wrong := health.check(loss, norm, losses)):
            clip_grad_norm(weights, norm, clip)
            for optimizer, _ in optimizers:
                optimizer.step() if scaler is None else scaler.step(optimizer)
            update_ema(average, models, index, ema)
            losses.append(loss)
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            quartiles = update_quartile_losses(quartiles, each, t, len(diffusion))
            if hasattr(timesteps, "update"):
                timesteps.update(*(accelerator.gather(value) for value in (t, each)))
            health.step_taken(index, average, losses)
        elif scaler is not None and math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1:
            health.skipped += 1                                              # fp16 overflowed, and the scaler takes a smaller scale
        else:
            note = f"step {index} is skipped: {wrong}"
            if health.step_skipped(f"{wrong} at step {index}", index):
                back = health.roll_back(models, average, [optimizer for optimizer, _ in adaptive]) if losses else ""
                if not back:
                    raise FloatingPointError(explain_failure(health, adaptive, checkpoint))
                note = f"{note}, the {patience}th in a row: {back}"
            warn_on_main_process(accelerator, note)
        if scaler is not None:
            scaler.update()
        clock.tick(len(pictures) * processes, seconds if processes > 1 else None)
        if phase == "adamw" and clock.index % 100 == 0 and plateaued(losses, window):
            phase, note = "sgd", f"the loss has stopped falling after step {index}: SGD at {sgd_learning_rate:g} takes over from AdamW"
        if not health.unhealthy and clock.is_save_due():
            note = warn_on_main_process(accelerator, save()) or note
        with clock.paused():                                               # the caller's time is not training time
            yield TrainingStep(index, loss, smooth, optimizers[0][0].param_groups[0]["lr"], taken, clock.images_per_second, clock.seconds,
                               clock.progress, *(average[name] if name in average else None for name in ("network", "encoder")),
                               quartiles, norm, health.skipped, note)
    if not losses and health.reason:
        raise FloatingPointError(explain_failure(health, adaptive, checkpoint))
    if clock.index > began:
        warn_on_main_process(accelerator, save())
    accelerator.wait_for_everyone()
