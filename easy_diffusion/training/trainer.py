"""The training loop, as a generator: it yields every step, and the caller logs, samples or stops.

Each step takes a batch x_0, draws a timestep t for each image and noise eps, forms

    x_t = alpha_t x_0 + sigma_t eps,

and descends the gradient of the loss of the network's prediction (Ho et al. 2020, algorithm 1). The
loop adds what a long training needs:

    caption dropout      Some captions become "", so that the network also learns the unconditional
                         prediction for classifier-free guidance (Ho & Salimans 2022, algorithm 1).
    EMA                  An average of the weights, from which one samples (ema.py).
    learning rate        It rises during the first steps (warm-up) and falls to zero at the end.
    AdamW, then SGD      When the loss has plateaued, SGD with a tiny learning rate fine-tunes.
    micro-batches        A batch that is too large for the memory is split; the gradients add up.
    training health      Steps that are not finite, or spikes, are skipped (health.py).
    checkpoints          A killed run resumes at its last checkpoint (checkpoint.py).

Randomness. All random numbers of step i follow from (seed, i): timesteps, dropped captions, noise,
and dropout inside the network. With a loader of `make_loader` a run that was killed therefore ends
with the weights of an unbroken run: on a CPU bit for bit, unless its length is given in minutes.

Several processes. Timesteps, dropped captions and, on a CPU, noise are drawn for the batches of all
processes, and each process takes its part. Two processes thus learn what one process learns with a
batch twice as large. On a GPU the noise of each process has a seed of its own.

accelerate handles the device, the precision and the communication. The file needs torch,
accelerate, the folders diffusion/ and networks/ and, beside it, checkpoint.py, data_loader.py,
distributed.py, ema.py, health.py, memory.py, optimizers.py and progress.py.

>>> from ..diffusion.gaussian import GaussianDiffusion
>>> from ..diffusion.schedule import NoiseSchedule
>>> class Network(torch.nn.Conv2d):
...     def forward(self, x_t, t, context, mask):
...         return super().forward(x_t)
>>> images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
>>> loader = [(images, ["红", "绿", "蓝", "白"])]
>>> diffusion = GaussianDiffusion(NoiseSchedule.cosine(100))
>>> [step.index for step in train(Network(3, 3, 1), diffusion, loader, steps=3)]
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
from .data_loader import (
    ResumableBatchSampler,
    derive_seed,
    fork_rng,
    images_per_step,
    infinite_batches,
)
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
    """One training step, as `train` yields it.

    index: number of the step, from 0.
    loss: mean over the batch, in all processes.
    smooth_loss: exponential moving average of the losses of the steps taken.
    learning_rate: of AdamW, or of SGD in the phase "sgd".
    phase: "adamw" or "sgd".
    images_per_second: in all processes, since the run started or resumed.
    seconds: training time so far, without the caller's time.
    progress: from 0 to 1.
    network, encoder: the ones with the EMA weights, in eval mode; encoder is None if not trained.
    quartiles: the smoothed loss of the timesteps in each quarter of the schedule, the least noise
        first; nan: no timestep drawn yet. They show which part of a constant loss still falls
        (Nichol & Dhariwal 2021).
    gradient_norm: before clipping.
    skipped: number of skipped steps so far.
    note: what a log should record about the step; "" for most steps.
    """

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


def update_quartile_losses(
    smoothed: tuple[float, ...], losses: torch.Tensor, t: torch.Tensor, num_timesteps: int
) -> tuple[float, ...]:
    """Update the smoothed loss of each quarter of the schedule.

    smoothed: the four values before this step; nan for a quarter without losses so far.
    losses: of each image, [B].
    t: the images' timesteps, [B]: int64 below num_timesteps, or float in [0, 1].

    Each value moves by 1/50 towards the mean of the new losses in its quarter.
    """
    fractions = t if t.is_floating_point() else t / num_timesteps
    quarters = [min(int(4 * fraction), 3) for fraction in fractions.tolist()]
    losses = losses.tolist()
    updated = []
    for quarter, value in enumerate(smoothed):
        new = [loss for loss, q in zip(losses, quarters) if q == quarter]
        mean = statistics.fmean(new) if new else value
        updated.append(mean if math.isnan(value) else value + (mean - value) / 50)
    return tuple(updated)


def train(
    network,
    diffusion,
    loader,
    encoder=None,
    *,
    steps: int = 100_000,
    minutes: float | None = None,
    learning_rate: float = 1e-4,
    muon_learning_rate: float | None = None,
    sgd_learning_rate: float = 1e-6,
    window: int = 2000,
    plateaued: Callable[[list[float], int], bool] = has_plateaued,
    phase: str = "adamw",
    warmup: int = 100,
    decay: float = 0.4,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    caption_dropout: float = 0.1,
    clip: float = 1.0,
    timesteps=uniform_timesteps,
    micro_batches: int = 1,
    compile: bool = False,
    patience: int = 5,
    spike: float = 20.0,
    seed: int = 0,
    checkpoint=None,
    keep: int = 2,
    save_seconds: float = 30,
    accelerator: Accelerator | None = None,
) -> Iterator[TrainingStep]:
    """Train a network until `steps` steps or `minutes` minutes are over; yield every step.

    Model and data:

    network: maps (x_t, t, context, mask) to a tensor; trained in place.
    diffusion: has `loss`, `prediction_type` and a length T, such as GaussianDiffusion.
    loader: batches (images, captions): images uint8 [B, C, H, W], or latents float [B, Z, h, w];
        captions list[str]. A loader of `make_loader` resumes at the right batch and gives each of
        several processes its part.
    encoder: captions → (context [B, L, D], mask [B, L]); if given, trained with the network.
    caption_dropout: fraction of the captions that become "".
    timesteps: function (batch, T, generator) → t [batch], int64 or, for continuous time, float in
        [0, 1]. If it has the methods `weights` and `update`, it also weights the losses.

    Optimization:

    steps, minutes: length of the run, whichever ends first; the caller's time is not counted.
    learning_rate: AdamW's peak learning rate.
    muon_learning_rate: if given, Muon trains the matrices with this peak, AdamW the rest.
    sgd_learning_rate: SGD's learning rate, constant.
    phase: "adamw" or "sgd": the optimizer to start with.
    plateaued: function (losses, window) → bool. It is called every 100 steps; once it is True, SGD
        replaces AdamW and Muon.
    window: number of steps in each window of that test; also of the loss that selects path.best.
    warmup: number of steps during which the learning rate rises.
    decay: fraction of the run, at its end, during which AdamW's learning rate falls to zero.
    weight_decay: of AdamW and Muon.
    ema: upper limit of the decay of the averaged weights.
    clip: maximum norm of the gradient.
    micro_batches: number of parts into which a batch is split, to save memory.
    compile: whether the network is compiled with torch.compile.
    accelerator: for the device, the precision and the processes; default: `default_accelerator`.
    seed: of all random numbers.

    Safety:

    patience: number of bad steps in a row before a roll-back, see TrainingHealth.
    spike: how far above the recent losses a loss is a spike, see TrainingHealth.
    checkpoint: path of the checkpoint. If the file exists, the run resumes from it.
    save_seconds: training time between two checkpoints; one is also written at the end.
    keep: number of checkpoints to keep, see `save_checkpoint`; with 2 or more also path.best.

    Raises ValueError for an incompatible checkpoint, an empty loader, or no steps or time;
    FloatingPointError if the losses do not become finite again; torch.OutOfMemoryError if a batch
    does not fit in twice as many micro-batches either.
    """
    # Models, their EMA, and optimizers.
    clock = TrainingClock(steps, minutes, save_seconds)
    accelerator = accelerator or default_accelerator()
    device = accelerator.device
    rank = accelerator.process_index
    world_size = accelerator.num_processes
    scaler = accelerator.scaler             # scales the loss with fp16; otherwise None
    models = torch.nn.ModuleDict({"network": network})
    if encoder is not None:
        models["encoder"] = encoder
    models.to(device)
    broadcast_parameters(accelerator, models)
    ema_models = copy.deepcopy(models).requires_grad_(False).eval()
    ema_network = ema_models["network"]
    ema_encoder = ema_models["encoder"] if encoder is not None else None
    forward = torch.compile(network) if compile else network
    parameters = [parameter for parameter in models.parameters() if parameter.requires_grad]
    adamw = build_optimizers(parameters, learning_rate, muon_learning_rate, weight_decay)
    # SGD without momentum has no state, so it need not be saved.
    sgd = [(torch.optim.SGD(parameters, sgd_learning_rate), sgd_learning_rate)]
    if isinstance(loader, DataLoader):
        if not isinstance(loader.batch_sampler, ResumableBatchSampler):
            loader = accelerator.prepare(loader)
    generator = torch.Generator(device)

    # The state that a checkpoint must hold.
    health = TrainingHealth(ema_models, patience, spike=spike)
    stateful = {"health": health, "scaler": scaler, "timesteps": timesteps}
    stateful = {name: part for name, part in stateful.items() if hasattr(part, "state_dict")}
    step_images = images_per_step(loader, world_size)
    losses = []                             # of all steps taken
    smooth_loss = math.nan
    quartile_losses = (math.nan,) * 4
    lowest_loss = math.inf                  # the lowest mean of `window` losses
    micro_batches_doubled = False           # whether the memory has run out before

    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_newest_checkpoint(checkpoint)
        check_compatible(checkpoint, saved, adamw, diffusion.prediction_type, step_images)
        load_weights(models, saved["models"])
        load_weights(ema_models, saved["ema"])
        for (optimizer, _), state in zip(adamw, saved["optimizers"]):
            optimizer.load_state_dict(state)
        for name in stateful.keys() & saved.keys():
            stateful[name].load_state_dict(saved[name])
        phase = saved["phase"]
        losses = saved["losses"]
        smooth_loss = saved["smooth_loss"]
        quartile_losses = saved["quartile_losses"]
        lowest_loss = saved["lowest_loss"]
        if saved["micro_batches_doubled"]:
            # If the caller asks for more micro-batches than were saved, they may double once more.
            micro_batches_doubled = micro_batches <= saved["micro_batches"]
            micro_batches = max(micro_batches, saved["micro_batches"])
        clock.start(saved["index"], saved["seconds"])
    check_same_step(accelerator, checkpoint, clock.index)

    def save() -> str:
        """Write the checkpoint; return a warning if the disk refused it."""
        nonlocal lowest_loss
        if checkpoint is None or not accelerator.is_main_process:
            return ""
        window_loss = statistics.fmean(losses[-window:]) if losses else math.inf
        tree = {
            "models": models.state_dict(),
            "ema": ema_models.state_dict(),
            "index": clock.index,
            "phase": phase,
            "losses": losses,
            "optimizers": [optimizer.state_dict() for optimizer, _ in adamw],
            "seconds": clock.seconds,
            "progress": clock.progress,
            "prediction_type": diffusion.prediction_type,
            "smooth_loss": smooth_loss,
            "quartile_losses": quartile_losses,
            "lowest_loss": min(window_loss, lowest_loss),
            "micro_batches": micro_batches,
            "micro_batches_doubled": micro_batches_doubled,
            "images_per_step": step_images,
        }
        tree |= {name: part.state_dict() for name, part in stateful.items()}
        warning = save_or_warn(checkpoint, tree, keep, best=window_loss < lowest_loss)
        if not warning:
            lowest_loss = min(window_loss, lowest_loss)
        return warning

    def compute_gradients(images, captions):
        """Leave the gradient of the batch's mean loss in the parameters.

        Returns the loss of each image, its timestep and its loss weight, [B] each.
        """
        for parameter in parameters:
            parameter.grad = None

        # Timesteps and dropped captions of all processes, of which this one takes its part.
        generator.manual_seed(derive_seed(seed, clock.index))
        count = len(images)
        own_part = slice(rank * count, (rank + 1) * count)
        with fork_rng(derive_seed(seed, clock.index)):
            t = timesteps(count * world_size, len(diffusion), generator)[own_part]      # [B]
        dropped = torch.rand(count * world_size, generator=generator, device=device)[own_part]
        dropped = dropped < caption_dropout
        if encoder is not None:
            captions = ["" if drop else text for drop, text in zip(dropped.tolist(), captions)]
        if hasattr(timesteps, "weights"):
            loss_weights = timesteps.weights(t).to(device)
        else:
            loss_weights = torch.ones(count, device=device)

        # The noise: on a CPU, skip that of the processes before; on a GPU, use a seed of its own.
        if device.type == "cpu":
            torch.randn(rank * count, *images.shape[1:], generator=generator)
        else:
            generator.manual_seed(derive_seed(seed, clock.index, rank))

        image_losses = []
        context = None
        mask = None
        size = math.ceil(count / micro_batches)
        with fork_rng(derive_seed(seed, clock.index, rank)):
            for start in range(0, count, size):
                part = slice(start, start + size)
                x0 = images[part].to(device, non_blocking=True).float()     # [M, C, H, W]
                if images.dtype == torch.uint8:     # otherwise these are latents
                    x0 = x0 / 127.5 - 1
                with accelerator.autocast():
                    if encoder is not None:
                        context, mask = encoder(captions[part])             # [M, L, D], [M, L]
                    loss = diffusion.loss(forward, x0, t[part], context, mask, generator)   # [M]
                # 1 / B, not 1 / M, so that the gradients of the micro-batches add up to the mean.
                mean_loss = (loss * loss_weights[part].to(x0)).sum() / count
                if scaler is not None:
                    mean_loss = scaler.scale(mean_loss)
                mean_loss.backward()
                image_losses.append(loss.detach())
        return torch.cat(image_losses), t, loss_weights

    first_index = clock.index
    batches = infinite_batches(loader, clock.index, rank, world_size)
    while clock.progress < 1:
        images, captions = next(batches)
        index = clock.index
        step_phase = phase
        note = ""
        models.train()

        # Gradients, with twice as many micro-batches if any process runs out of memory.
        result = catch_out_of_memory(compute_gradients, images, captions)
        while any_rank(accelerator, result is None):
            if micro_batches_doubled:
                raise torch.OutOfMemoryError(
                    f"{OUT_OF_MEMORY} at step {index} with {micro_batches} micro-batches, too: "
                    "use a smaller batch"
                )
            micro_batches *= 2
            micro_batches_doubled = True
            note = warn_on_main_process(
                accelerator,
                f"{OUT_OF_MEMORY} at step {index}; from now on each batch of {len(images)} images "
                f"is split into {micro_batches} micro-batches, whose gradients add up",
            )
            result = catch_out_of_memory(compute_gradients, images, captions)
        image_losses, t, loss_weights = result
        average_gradients(accelerator, parameters)

        # Loss, gradient norm and learning rates.
        optimizers = adamw if phase == "adamw" else sgd
        if scaler is not None:
            for optimizer, _ in optimizers:
                scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )
        mean_loss = (image_losses * loss_weights).mean()
        loss, norm, seconds = reduce_metrics(accelerator, mean_loss, norm, clock.now())
        set_learning_rates(adamw, clock.lr_multiplier(warmup, decay) * health.lr_scale)
        set_learning_rates(sgd, health.lr_scale)

        reason = health.check(loss, norm, losses)
        fp16_overflow = (
            scaler is not None
            and math.isfinite(loss)
            and not math.isfinite(norm)
            and scaler.get_scale() > 1
        )
        if not reason:                      # take the step
            clip_grad_norm(parameters, norm, clip)
            for optimizer, _ in optimizers:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
            update_ema(ema_models, models, index, ema)
            losses.append(loss)
            smooth_loss = loss if math.isnan(smooth_loss) else 0.98 * smooth_loss + 0.02 * loss
            quartile_losses = update_quartile_losses(
                quartile_losses, image_losses, t, len(diffusion)
            )
            if hasattr(timesteps, "update"):
                timesteps.update(accelerator.gather(t), accelerator.gather(image_losses))
            health.step_taken(index, ema_models, losses)
        elif fp16_overflow:                 # skip it; scaler.update() below lowers the scale
            health.skipped += 1
        else:                               # skip it, and roll back after several in a row
            note = f"step {index} is skipped: {reason}"
            if health.step_skipped(f"{reason} at step {index}", index):
                rolled_back = ""
                if losses:                  # otherwise no step has ever been good
                    rolled_back = health.roll_back(
                        models, ema_models, [optimizer for optimizer, _ in adamw]
                    )
                if not rolled_back:
                    raise FloatingPointError(explain_failure(health, adamw, checkpoint))
                note = f"{note}; {patience} bad steps in a row: {rolled_back}"
            warn_on_main_process(accelerator, note)
        if scaler is not None:
            scaler.update()

        # The end of the step: time, plateau, checkpoint.
        clock.tick(len(images) * world_size, seconds if world_size > 1 else None)
        if phase == "adamw" and clock.index % 100 == 0 and plateaued(losses, window):
            phase = "sgd"
            note = (
                f"training has plateaued after step {index}: "
                f"SGD at {sgd_learning_rate:g} takes over from AdamW"
            )
        if not health.unhealthy and clock.is_save_due():
            note = warn_on_main_process(accelerator, save()) or note
        with clock.paused():                # the caller's time is not training time
            yield TrainingStep(
                index=index,
                loss=loss,
                smooth_loss=smooth_loss,
                learning_rate=optimizers[0][0].param_groups[0]["lr"],
                phase=step_phase,
                images_per_second=clock.images_per_second,
                seconds=clock.seconds,
                progress=clock.progress,
                network=ema_network,
                encoder=ema_encoder,
                quartiles=quartile_losses,
                gradient_norm=norm,
                skipped=health.skipped,
                note=note,
            )

    if not losses and health.reason:
        raise FloatingPointError(explain_failure(health, adamw, checkpoint))
    if clock.index > first_index:
        warn_on_main_process(accelerator, save())
    accelerator.wait_for_everyone()
