"""The options of a training, in groups, with their defaults.

    TrainingOptions            of `train` in trainer.py
        OptimizerOptions       learning rates, weight decay, clipping, EMA
        RunOptions             length of the run, warm-up and decay of the learning rate
        PlateauOptions         the phase with SGD after the loss has plateaued
        SafetyOptions          checkpoints, and what happens to bad steps
    AutoencoderOptions         of `train_autoencoder` in train_autoencoder.py
        OptimizerOptions, RunOptions
        ReconstructionOptions  weights of the terms of the loss
        AdversarialOptions     the discriminator

The functions take the options as keyword arguments without their group: `train(..., steps=1000,
learning_rate=1e-3)`. `replace_options` sorts them into the groups. The file needs torch and,
beside it, muon.py and optimizers.py; from this package also diffusion/.

>>> options = replace_options(TrainingOptions(), steps=1000, seed=7)
>>> options.run.steps, options.optimizer.learning_rate, options.seed
(1000, 0.0001, 7)
>>> replace_options(TrainingOptions(), step=1000)
Traceback (most recent call last):
TypeError: there is no option 'step'; did you mean 'steps'?
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

from ..diffusion.timesteps import uniform_timesteps
from .optimizers import has_plateaued

# ---------------------------------------------------------------- of a diffusion model's training


@dataclass(frozen=True)
class OptimizerOptions:
    """How the weights follow the gradient.

    learning_rate: AdamW's peak learning rate.
    muon_learning_rate: if given, Muon trains the matrices with this peak, AdamW the rest.
    weight_decay: of AdamW and Muon.
    clip: maximum norm of the gradient.
    ema: upper limit of the decay of the averaged weights, see `update_ema`.
    """

    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999


@dataclass(frozen=True)
class RunOptions:
    """Length of the run, and the learning rate over the run; see `TrainingClock`.

    steps, minutes: the run ends at whichever limit comes first; None: no such limit. The caller's
        time between two steps is not counted.
    warmup: number of steps during which the learning rate rises; at most a tenth of the run.
    decay: fraction of the run, at its end, during which the learning rate falls to zero.
    """

    steps: int | None = 100_000
    minutes: float | None = None
    warmup: int = 100
    decay: float = 0.4


@dataclass(frozen=True)
class PlateauOptions:
    """SGD with a tiny learning rate fine-tunes the weights once the loss has plateaued.

    The first version of this project trained so. It is on by default, but did not help in
    notebook 17; `plateaued=lambda losses, window: False` switches it off.

    Why, and how it relates to the decay of the learning rate: see `OptimizerPhases`.

    phase: "adamw" or "sgd": the optimizer to start with.
    sgd_learning_rate: SGD's learning rate, constant.
    plateaued: function (losses, window) → bool. It is called every 100 steps; once it is True, SGD
        replaces AdamW and Muon.
    window: number of steps in each window of that test; also of the loss that selects path.best.
    """

    phase: str = "adamw"
    sgd_learning_rate: float = 1e-6
    plateaued: Callable[[list[float], int], bool] = has_plateaued
    window: int = 2000


@dataclass(frozen=True)
class SafetyOptions:
    """Checkpoints, and what happens to bad steps.

    checkpoint: path of the checkpoint. If the file exists, the run resumes from it.
    save_seconds: training time between two checkpoints; one is also written at the end.
    keep: number of checkpoints to keep, see `save_checkpoint`; with 2 or more also path.best.
    patience: number of bad steps in a row before a roll-back, see `TrainingHealth`.
    spike: how far above the recent losses a loss is a spike, see `TrainingHealth`.
    """

    checkpoint: str | Path | None = None
    save_seconds: float = 30.0
    keep: int = 2
    patience: int = 5
    spike: float = 20.0


@dataclass(frozen=True)
class TrainingOptions:
    """The options of `train`.

    optimizer, run, plateau, safety: the groups above.
    caption_dropout: probability with which a caption is replaced by `encoder.uncond`.
    timesteps: not the timesteps, but a function that draws those of a batch: (batch, T, generator)
        → t [batch], int64 or, for continuous time, float in [0, 1]. It may be an object with
        methods, all optional: weights(t [B]) → the factors [B] of the losses; update(t, losses)
        learns from a step's losses; state_dict and load_state_dict store what it has learned in
        checkpoints. ImportanceTimesteps in diffusion/timesteps.py has all four.
    micro_batches: number of parts into which a batch is split, to save memory.
    compile: whether the network is compiled with torch.compile.
    graphs: whether losses and gradients are recorded as a CUDA graph; on a single GPU only.
    seed: of timesteps, dropped captions, noise and dropout; that of the batches is an argument of
        `make_loader`, and the initial weights are the caller's.
    accelerator: for the device, the precision and the processes; None: `default_accelerator`.
    """

    optimizer: OptimizerOptions = OptimizerOptions()
    run: RunOptions = RunOptions()
    plateau: PlateauOptions = PlateauOptions()
    safety: SafetyOptions = SafetyOptions()
    caption_dropout: float = 0.1
    timesteps: Callable = uniform_timesteps
    micro_batches: int = 1
    compile: bool = False
    graphs: bool = True
    seed: int = 0
    accelerator: object = None


# ---------------------------------------------------------------- of an autoencoder's training


@dataclass(frozen=True)
class ReconstructionOptions:
    """Weights of the terms of an autoencoder's loss beside |x - y|.

    squared, structure, kl: of (x - y)², of the structure and of the KL divergence.
    perceptual: a perceptual distance (x, y) → [B], such as LPIPS; "efficientnet" for the distance
        in the features of EfficientNet-Lite; None for no such term.
    perceptual_weight: its weight.
    """

    squared: float = 4.0
    structure: float = 0.0
    kl: float = 1e-4
    perceptual: Callable | str | None = None
    perceptual_weight: float = 1.0


@dataclass(frozen=True)
class AdversarialOptions:
    """The patch discriminator of an autoencoder's training.

    discriminator: D of the adversarial term, trained in place; None for no such term.
    discriminator_from: fraction of the training after which the discriminator joins.
    discriminator_learning_rate: of its AdamW, constant.
    adversarial: weight of the adversarial term, relative to all other terms; see `adaptive_weight`.
    """

    discriminator: object = None
    discriminator_from: float = 0.5
    discriminator_learning_rate: float = 2e-4
    adversarial: float = 0.5


@dataclass(frozen=True)
class AutoencoderOptions:
    """The options of `train_autoencoder`.

    optimizer, run, reconstruction, adversary: the groups above. AdamW's peak is 1e-3.
    checkpoint: path, written every save_seconds seconds and at the end; if the file exists, the
        training resumes from it.
    save_seconds: training time between two checkpoints.
    seed: of the generator that draws z.
    accelerator: an Accelerator of one process; None: `default_accelerator`.
    """

    optimizer: OptimizerOptions = OptimizerOptions(learning_rate=1e-3)
    run: RunOptions = RunOptions()
    reconstruction: ReconstructionOptions = ReconstructionOptions()
    adversary: AdversarialOptions = AdversarialOptions()
    checkpoint: str | Path | None = None
    save_seconds: float = 30.0
    seed: int = 0
    accelerator: object = None


# ---------------------------------------------------------------- keyword arguments → options


def replace_options(options, **changes):
    """Return a copy of options with some of them changed.

    options: a dataclass such as TrainingOptions, whose fields are options or groups of options.
    changes: new values, by the name of the option without its group, or by the name of a group.

    Raises TypeError for a name that no option has.
    """
    # The name of each option → that of its group; None: a group itself, or an option without one.
    groups = {}
    for field in fields(options):
        groups[field.name] = None
        value = getattr(options, field.name)
        if is_dataclass(value):
            groups |= {option.name: field.name for option in fields(value)}
    check_option_names(changes, groups)

    # First whole groups and the options without one, then single options of the groups.
    own = {name: value for name, value in changes.items() if groups[name] is None}
    options = replace(options, **own)
    for name, value in changes.items():
        group = groups[name]
        if group is not None:
            changed_group = replace(getattr(options, group), **{name: value})
            options = replace(options, **{group: changed_group})
    return options


def check_option_names(names, known) -> None:
    """Raise TypeError for a name that is not known; it suggests a similar one."""
    for name in sorted(set(names) - set(known)):
        similar = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"there are {sorted(known)}"
        raise TypeError(f"there is no option {name!r}; {hint}")
