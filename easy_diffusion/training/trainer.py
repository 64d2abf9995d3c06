"""The training loop, made robust. It yields every step, and the caller logs, samples or stops.

The step is that of simple.py, algorithm 1 of Ho et al. 2020. Read that file first. This one adds
what a long training needs, each in a file of its own:

    learning rate        It rises during the first steps and falls to zero at the end (clock.py).
    AdamW, then SGD      When the loss has plateaued, SGD takes over (optimizers.py); optional.
    micro-batches        A batch too large for the memory is split; gradients add up (memory.py).
    training health      Steps that are not finite, or spikes, are skipped (health.py).
    checkpoints          A killed run resumes at its last checkpoint (checkpoint.py).
    several processes    They learn what one learns with a larger batch (distributed.py).
    one training         A second one with the same checkpoint is refused (lock.py).
    CUDA graphs          A GPU replays the losses and gradients of a step (cuda_graphs.py).

With a loader of `make_loader` a run that was killed ends with the weights of an unbroken run: on a
CPU bit for bit, unless its length is given in minutes; see draws.py.

accelerate handles the device, the precision and the communication. The file needs torch,
accelerate, safetensors, psutil, the folders diffusion/ and networks/ and, beside it, all files that
are named here and data_loader.py, draws.py, ema.py, loss_history.py, muon.py, options.py,
training_step.py and weight_casts.py.

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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import load_training, save_training
from .clock import TrainingClock
from .cuda_graphs import CudaGraphs, caption_inputs, has_caption_inputs
from .data_loader import Batch, infinite_batches, normalize_pixels, prepare_loader, unpack_batch
from .distributed import (
    any_rank,
    average_gradients,
    broadcast_parameters,
    check_same_step,
    compute_dtype,
    default_accelerator,
    gather,
    reduce_metrics,
    warn_on_main_process,
)
from .draws import StepDraws
from .ema import EMA
from .health import TrainingHealth, explain_failure
from .lock import locked
from .loss_history import LossHistory
from .memory import MicroBatches, catch_out_of_memory
from .optimizers import OptimizerPhases, clip_grad_norm, compute_grad_norm, is_fp16_overflow
from .options import TrainingOptions, replace_options
from .training_step import TrainingStep
from .weight_casts import WeightCasts

# Why a step is skipped whose gradient overflows in fp16, which is no fault of the training.
FP16_OVERFLOW = "the gradient overflows in fp16"


class BatchLosses(NamedTuple):
    """Of each image of this process's batch, [B] each: its loss, its timestep, its loss weight.

    losses and weights are on the device, t is on the CPU.
    """

    losses: torch.Tensor
    t: torch.Tensor
    weights: torch.Tensor


class Trainer:
    """A network, its EMA, its optimizers, and everything else that a checkpoint holds.

    network, diffusion, loader, encoder: see `train`.
    options: TrainingOptions.

    `run` is the loop; the methods after it are its parts, in the order in which it calls them.
    """

    def __init__(self, network, diffusion, loader, encoder, options: TrainingOptions):
        self.options = options
        self.diffusion = diffusion
        # What is called, perhaps compiled. self.models below holds the plain modules, with the same
        # weights, for the EMA, the optimizers and the checkpoint.
        self.network = torch.compile(network) if options.compile else network
        self.encoder = encoder

        # Device, processes and precision. Only with fp16 does the scaler do anything.
        self.accelerator = options.accelerator or default_accelerator()
        self.device = self.accelerator.device
        self.world_size = self.accelerator.num_processes
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)
        self.loader = prepare_loader(self.accelerator, loader)

        # Models, their EMA, optimizers.
        modules = {"network": network} | ({} if encoder is None else {"encoder": encoder})
        self.models = torch.nn.ModuleDict(modules).to(self.device)
        broadcast_parameters(self.accelerator, self.models)
        self.ema_models = copy.deepcopy(self.models).requires_grad_(False).eval()
        self.ema = EMA(self.ema_models, self.models, options.optimizer.ema)
        self.parameters = [weight for weight in self.models.parameters() if weight.requires_grad]
        self.optimizers = OptimizerPhases(self.parameters, options.optimizer, options.plateau)
        # torch.compile needs no help to cast all weights at once.
        dtype = torch.float32 if options.compile else compute_dtype(self.accelerator)
        self.weight_casts = WeightCasts(self.models, dtype)

        # What draws, counts and judges.
        run, safety = options.run, options.safety
        self.draws = StepDraws(
            options.timesteps, len(diffusion), options.caption_dropout, options.seed,
            getattr(encoder, "uncond", ""), self.device,
            self.accelerator.process_index, self.world_size,
        )
        self.clock = TrainingClock(run.steps, run.minutes, safety.save_seconds)
        self.history = LossHistory()
        self.health = TrainingHealth(self.ema_models, safety.patience, spike=safety.spike)
        self.micro_batches = MicroBatches(options.micro_batches)
        self.notes = []                     # of the current step

        # A single GPU replays losses and gradients as a CUDA graph.
        self.graphs = None
        single_gpu = self.device.type == "cuda" and self.world_size == 1
        if options.graphs and single_gpu and has_caption_inputs(encoder):
            self.graphs = CudaGraphs(
                self.add_gradients, self.device, self.parameters, [self.draws.noise_generator]
            )
            self.optimizers.record_graphs(self.device)

    def run(self) -> Iterator[TrainingStep]:
        """Train until the steps or the minutes are over; yield every step."""
        first_index = self.restore()
        batches = infinite_batches(self.loader, first_index, self.draws.rank, self.world_size)
        while self.clock.progress < 1:
            # The losses of a batch, and the gradient of their mean.
            index = self.clock.index
            self.notes = []
            batch = unpack_batch(next(batches))
            losses = self.compute_loss_and_gradients(index, batch)
            self.unscale_gradients()
            loss, norm, image_losses, seconds = self.reduce(losses)

            # The optimizer step and the EMA, unless the step is bad.
            phase = self.optimizers.phase
            learning_rate = self.set_learning_rates()
            reason = self.check_health(loss, norm)
            if reason:
                self.skip(index, reason)
            else:
                self.update(index, loss, norm, image_losses, losses.t)

            # Time, plateau, checkpoint. The caller's time is not training time.
            self.clock.tick(self.world_size * len(batch.images), seconds)
            self.check_plateau()
            self.save_if_due()
            with self.clock.paused():
                yield self.describe_step(index, phase, learning_rate, loss, norm)
        self.finish(first_index)

    # ------------------------------------------------------------ the start

    def restore(self) -> int:
        """Load the checkpoint, if there is one; return the index of the first step."""
        path = self.options.safety.checkpoint
        self.clock.start()
        if path is not None and Path(path).exists():
            load_training(self)
        check_same_step(self.accelerator, path, self.clock.index)
        return self.clock.index

    # ------------------------------------------------------------ the losses and the gradients

    def compute_loss_and_gradients(self, index: int, batch: Batch) -> BatchLosses:
        """Leave the gradient of the mean loss in the parameters, averaged over all processes.

        If any process runs out of memory, all repeat the step with twice as many micro-batches.
        """
        if not all(model.training for model in self.models.values()):   # the caller has sampled
            self.models.train()
        losses = catch_out_of_memory(self.backpropagate, index, batch)
        while any_rank(self.accelerator, losses is None):
            # At most twice: the second time, double() raises torch.OutOfMemoryError.
            self.warn(self.micro_batches.double(index, len(batch.images)))
            losses = catch_out_of_memory(self.backpropagate, index, batch)

        # By hand, not during the backward pass as DistributedDataParallel does: a process that has
        # run out of memory there must not leave the others waiting for its gradients.
        average_gradients(self.accelerator, self.parameters)
        return losses

    def backpropagate(self, index: int, batch: Batch) -> BatchLosses:
        """Compute the losses of this process's batch and the gradient of their mean."""
        t, captions = self.draws.start_step(index, batch)
        weights = torch.ones(len(t), device=self.device)
        if hasattr(self.options.timesteps, "weights"):
            weights = self.options.timesteps.weights(t).to(self.device, non_blocking=True)

        inputs = {"images": batch.images, "t": t, "weights": weights}
        inputs |= {f"extra {name}": extra for name, extra in batch.extras.items()}
        with self.draws.dropout_rng(index):
            if self.graphs is None:
                losses = self.add_gradients(inputs | {"captions": captions})
            else:
                losses = self.graphs(inputs | caption_inputs(self.encoder, captions))
        return BatchLosses(losses, t, weights)

    def add_gradients(self, inputs: dict) -> torch.Tensor:
        """Add up the gradients of the micro-batches; return the losses [B]."""
        for parameter in self.parameters:
            parameter.grad = None
        losses = []
        batch_size = len(inputs["t"])
        with self.weight_casts.apply():
            for part in self.micro_batches.slices(batch_size):
                micro_batch = {name: values[part] for name, values in inputs.items()}
                loss = self.compute_losses(micro_batch)                         # [M]
                # 1 / B, not 1 / M, so that the gradients of the micro-batches add up to the mean.
                mean_loss = (loss * micro_batch["weights"].to(loss)).sum() / batch_size
                self.scaler.scale(mean_loss).backward()
                losses.append(loss.detach())
        return torch.cat(losses)

    def compute_losses(self, inputs: dict) -> torch.Tensor:
        """Return the loss of each of M images, [M], with a graph for its gradient.

        inputs: "images", "t", "weights"; "extra NAME" for each extra of the batch; and "captions",
            or what `caption_inputs` has made of them.
        """
        x0 = self.to_device(inputs["images"]).float()                           # [M, C, H, W]
        t = inputs["t"].to(self.device, non_blocking=True)                      # [M]
        extras = {
            name.removeprefix("extra "): self.to_device(values)
            for name, values in inputs.items() if name.startswith("extra ")
        }
        with self.accelerator.autocast():
            context, mask = self.encode_captions(inputs)                        # [M, L, D], [M, L]
            with_extras = partial(self.network, **extras)
            noise_generator = self.draws.noise_generator
            return self.diffusion.loss(with_extras, x0, t, context, mask, noise_generator)

    def encode_captions(self, inputs: dict) -> tuple:
        """Return context and mask of the captions, or of what `caption_inputs` made of them."""
        if self.encoder is None:
            return None, None
        if "captions" in inputs:
            return self.encoder(inputs["captions"])
        if "tokens" in inputs:
            return self.encoder.encode(inputs["tokens"].to(self.device, non_blocking=True))
        return inputs["context"], inputs["mask"]

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        """Move a tensor of a batch to the device; pixels become [-1, 1]."""
        return normalize_pixels(values.to(self.device, non_blocking=True))

    def unscale_gradients(self) -> None:
        """Divide the gradients by the factor that `backpropagate` has scaled the loss by (fp16)."""
        for optimizer in self.optimizers.current:
            self.scaler.unscale_(optimizer)

    def reduce(self, losses: BatchLosses) -> tuple[float, float, torch.Tensor, float | None]:
        """Return loss, gradient norm, losses of this process's images and the time in seconds.

        Loss, norm and time are those of all processes. One copy brings all values to the CPU; it is
        the only moment of a step at which the CPU waits for the GPU.

        Several processes must agree on the time, so that all stop and save at the same step; they
        take that of the main process here. One process needs no agreement: its time is None, and
        `clock.tick` reads the clock at the end of the step, after the optimizer step.
        """
        norm = compute_grad_norm(self.parameters)
        mean_loss = (losses.losses * losses.weights).mean()
        metrics = torch.stack([mean_loss.float(), norm.float()])
        metrics = torch.cat([metrics, losses.losses.float()]).cpu()             # [2 + B]
        loss, norm, seconds = reduce_metrics(self.accelerator, *metrics[:2], self.clock.now())
        return loss, norm, metrics[2:], seconds if self.world_size > 1 else None

    # ------------------------------------------------------------ the optimizer step

    def set_learning_rates(self) -> float:
        """Set the learning rates of this step; return that of the phase's first optimizer."""
        run = self.options.run
        lr_multiplier = self.clock.lr_multiplier(run.warmup, run.decay)
        return self.optimizers.set_learning_rates(lr_multiplier, self.health.lr_scale)

    def check_health(self, loss: float, norm: float) -> str:
        """Return why the step must be skipped; "" for a good step."""
        if is_fp16_overflow(loss, norm, self.scaler):
            return FP16_OVERFLOW
        return self.health.check(loss, norm, self.history.losses)

    def update(
        self, index: int, loss: float, norm: float, image_losses: torch.Tensor, t: torch.Tensor
    ) -> None:
        """Take the step: clip the gradient, step the optimizers, update the EMA and the records.

        image_losses, t: of the images of this process's batch, [B], on the CPU.
        """
        clip_grad_norm(self.parameters, norm, self.options.optimizer.clip)
        for optimizer in self.optimizers.current:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.ema.update(index)

        self.history.update(loss, image_losses, t, len(self.diffusion))
        if hasattr(self.options.timesteps, "update"):
            t, image_losses = (gather(self.accelerator, values) for values in (t, image_losses))
            self.options.timesteps.update(t, image_losses)
        self.health.step_taken(index, self.ema_models, self.history.losses)

    def skip(self, index: int, reason: str) -> None:
        """Leave weights and optimizers as they are; after several bad steps in a row, roll back."""
        self.scaler.update()
        if reason == FP16_OVERFLOW:         # update() has lowered the scale; that is all it needs
            self.health.skipped += 1
            return
        message = f"step {index} is skipped: {reason}"
        if self.health.step_skipped(f"{reason} at step {index}", index):
            message = f"{message}; {self.roll_back()}"
        self.warn(message)

    def roll_back(self) -> str:
        """Return to earlier EMA weights; return a sentence that says so."""
        adamw = [optimizer for optimizer, _ in self.optimizers.adamw]
        message = ""
        if self.history.losses:             # otherwise no step has ever been good
            message = self.health.roll_back(self.models, self.ema_models, adamw)
        if not message:
            self.give_up()
        return message

    def give_up(self) -> None:
        """Raise FloatingPointError with the reason for the bad steps and what may help."""
        checkpoint = self.options.safety.checkpoint
        message = explain_failure(self.health, self.optimizers.adamw, checkpoint)
        raise FloatingPointError(message)

    # ------------------------------------------------------------ the end of a step, and of the run

    def check_plateau(self) -> None:
        """Change from AdamW to SGD if the loss has plateaued."""
        self.add_note(self.optimizers.check_plateau(self.history.losses, self.clock.index))

    def save_if_due(self) -> None:
        """Save after `save_seconds`, but not between a bad step and the next good one."""
        if not self.health.unhealthy and self.clock.is_save_due():
            self.save()

    def save(self) -> None:
        """Write the checkpoint in the main process; warn if the disk refuses it."""
        if self.options.safety.checkpoint is not None and self.accelerator.is_main_process:
            self.warn(save_training(self))

    def warn(self, message: str) -> None:
        """Warn in the main process, and note it in the step; "" changes nothing."""
        self.add_note(warn_on_main_process(self.accelerator, message))

    def add_note(self, note: str) -> None:
        """Add a note for the log to the current step, after those before; "" changes nothing."""
        if note:
            self.notes.append(note)

    def describe_step(
        self, index: int, phase: str, learning_rate: float, loss: float, norm: float
    ) -> TrainingStep:
        """Return what `run` yields; phase, learning_rate: of the step, not of the next one."""
        return TrainingStep(
            index=index,
            loss=loss,
            smooth_loss=self.history.smooth_loss,
            learning_rate=learning_rate,
            phase=phase,
            images_per_second=self.clock.images_per_second,
            seconds=self.clock.seconds,
            progress=self.clock.progress,
            ema_network=self.ema_models["network"],
            ema_encoder=self.ema_models["encoder"] if self.encoder is not None else None,
            quartiles=self.history.quartile_losses,
            gradient_norm=norm,
            skipped=self.health.skipped,
            note="; ".join(self.notes),
        )

    def finish(self, first_index: int) -> None:
        """Write the last checkpoint, unless no step was taken; wait for the other processes."""
        if not self.history.losses and self.health.reason:
            self.give_up()
        if self.clock.index > first_index:
            self.save()
        self.accelerator.wait_for_everyone()


def train(network, diffusion, loader, encoder=None, **options) -> Iterator[TrainingStep]:
    """Train a network until `steps` steps or `minutes` minutes are over; yield every step.

    network: maps (x_t, t, context, mask, **extras) to a tensor; trained in place.
    diffusion: has `loss`, `prediction_type` and a length T, such as GaussianDiffusion.
    loader: batches (images, captions) or (images, captions, extras): images uint8 [B, C, H, W], or
        latents float [B, Z, h, w]; a list of B captions; extras: a dict of tensors [B, ...], which
        reach the network as keyword arguments, those of pixels (uint8) as floats in [-1, 1]. A
        loader of `make_loader` resumes at the right batch and gives each of several processes its
        part.
    encoder: captions → (context [B, L, D], mask [B, L]); if given, trained with the network. Its
        attribute `uncond` is the caption that replaces dropped ones; without it, that is "".
    options: the fields of TrainingOptions and of its groups in options.py, such as steps=1000,
        learning_rate=1e-3, checkpoint="model.safetensors".

    Raises TypeError for an unknown option; ValueError for an incompatible checkpoint, an empty
    loader, a batch of another form, or no steps or time; BlockingIOError if another training
    writes to the checkpoint; FloatingPointError if the losses do not become finite again;
    torch.OutOfMemoryError if a batch does not fit in twice as many micro-batches either.
    """
    options = replace_options(TrainingOptions(), **options)
    trainer = Trainer(network, diffusion, loader, encoder, options)
    return locked(trainer.run(), options.safety.checkpoint, trainer.accelerator)
