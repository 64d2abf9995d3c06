"""Cost of the training loop, and time until it generates well.

    python -m benchmarks.training [--quick]

Three loops train the demo's network and encoder on the demo's drawn dishes. They take turns in one
process:

    ours             `train`, as the demo calls it
    diffusers' way   the loop of diffusers' train_text_to_image.py: accelerate's prepare, accumulate
                     and backward, AdamW, its learning-rate scheduler, EMAModel, uniform timesteps,
                     mean squared error of v
    bare             the minimum: load a batch, add noise, forward, backward, optimizer step

Ours and the bare loop run with Muon, as in the demo, and with AdamW alone, as in diffusers' way. A
last row is the forward and backward pass alone. The claims are

    overhead                our step over the bare step, minus 1
    overhead_adamw          the same with AdamW alone
    over_forward_backward   our step with AdamW over the forward and backward pass, minus 1
    speedup                 the step of diffusers' way over ours, with AdamW

Then ours and diffusers' way are trained anew, until an attribute classifier classifies 80% of
generated held-out names exactly, or the time is over. Diffusers' way takes its published learning
rate of 1e-4 and, in a further row, 1e-3.

On a GPU a last table compares fp32, bf16 and torch.compile, with the fraction of the rate of matrix
multiplication, and the largest batch of the first version's network at 3×128×128 is searched.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from datasets.dishes import dish_names
from easy_diffusion import dish_classifier, presets
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.timesteps import logit_normal_timesteps
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.data_loader import infinite_batches, make_loader
from easy_diffusion.training.distributed import fast_precision
from easy_diffusion.training.memory import find_largest_batch, run_unsplit
from easy_diffusion.training.optimizers import build_optimizers
from easy_diffusion.training.trainer import train

from .fidelity import MIN_CLASSIFIER_ACCURACY, classify_dishes, measure_fidelity
from .report import finish, make_parser
from .unet import measure_matrix_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOAL = 0.8          # prompt accuracy


class LoopStep(NamedTuple):
    """A training step of ours or of diffusers' way.

    get_ema: () → (network, encoder) with the EMA weights, ready to sample.
    seconds: training time so far.
    """

    get_ema: Callable
    diffusion: GaussianDiffusion
    seconds: float


def build_networks() -> tuple:
    """Build the demo's (network, encoder, diffusion), with the same weights at each call."""
    torch.manual_seed(0)
    return presets.build_networks("".join(dish_names("train")))


# ------------------------------------------------------------------ the loops


def run_ours(store, minutes: float = 1e6, **changes) -> Iterator[LoopStep]:
    """Train as the demo does. changes: see `presets.train_demo`."""
    network, encoder, diffusion = build_networks()
    step = None

    def get_ema():
        return step.ema_network, step.ema_encoder

    for step in presets.train_demo(network, encoder, diffusion, store, None, minutes, **changes):
        yield LoopStep(get_ema, diffusion, step.seconds)


def run_diffusers_way(
    store, minutes: float = 1e6, learning_rate: float = 1e-4
) -> Iterator[LoopStep]:
    """Train with the loop of diffusers' example; network, encoder and samplers are ours."""
    # Networks, optimizer, learning rates and EMA
    network, encoder, _ = build_networks()
    schedule = NoiseSchedule.cosine(1000)
    diffusion = GaussianDiffusion(schedule, prediction_type="v")
    noise_scheduler = DDPMScheduler(
        1000,
        trained_betas=schedule.betas.float().numpy(),
        prediction_type="v_prediction",
    )
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision=fast_precision())
    weights = [*network.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        "constant_with_warmup", optimizer=optimizer, num_warmup_steps=100
    )
    loader = make_loader(store, presets.BATCH)
    network, encoder, optimizer, loader, lr_scheduler = accelerator.prepare(
        network, encoder, optimizer, loader, lr_scheduler
    )
    ema_models = [
        EMAModel(module.parameters(), decay=presets.TRAINING["ema"])
        for module in (network, encoder)
    ]
    for ema_model in ema_models:
        ema_model.to(accelerator.device)
    ema_network, ema_encoder, _ = build_networks()

    def get_ema():
        for ema_model, module in zip(ema_models, (ema_network, ema_encoder)):
            ema_model.copy_to(module.to(DEVICE).parameters())
        return ema_network.eval(), ema_encoder.eval()

    # Training; what the caller does between two steps does not count as training time.
    start = time.perf_counter()
    paused_seconds = 0.0
    for images, captions in infinite_batches(loader):
        with accelerator.accumulate(network):
            x0 = images.to(accelerator.device).float() / 127.5 - 1
            eps = torch.randn_like(x0)
            t = torch.randint(0, 1000, (len(x0),), device=x0.device).long()
            x_t = noise_scheduler.add_noise(x0, eps, t)
            captions = ["" if random.random() < 0.1 else caption for caption in captions]
            context, mask = encoder(captions)
            target = noise_scheduler.get_velocity(x0, eps, t)
            output = network(x_t, t, context, mask)
            loss = torch.nn.functional.mse_loss(
                output.float(), target.float(), reduction="mean"
            )
            accelerator.gather(loss.repeat(len(x0))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        for ema_model, module in zip(ema_models, (network, encoder)):
            ema_model.step(module.parameters())
        seconds = time.perf_counter() - start - paused_seconds
        if seconds > 60 * minutes:
            return
        pause_start = time.perf_counter()
        yield LoopStep(get_ema, diffusion, seconds)
        paused_seconds += time.perf_counter() - pause_start


def run_bare(
    store,
    optimize: bool = True,
    muon_learning_rate: float | None = presets.TRAINING["muon_learning_rate"],
) -> Iterator[None]:
    """Train without EMA, clipping, checks and log.

    optimize: False computes only the forward and backward pass, of the same batch at each step.
    """
    network, encoder, diffusion = build_networks()
    network = network.to(DEVICE).train()
    encoder = encoder.to(DEVICE).train()
    weights = [*network.parameters(), *encoder.parameters()]
    optimizers = build_optimizers(
        weights, presets.TRAINING["learning_rate"], muon_learning_rate
    )
    generator = torch.Generator(DEVICE).manual_seed(0)
    if optimize:
        batches = infinite_batches(make_loader(store, presets.BATCH))
    else:
        batches = itertools.repeat(next(iter(make_loader(store, presets.BATCH))))
    for images, captions in batches:
        x0 = images.to(DEVICE).float() / 127.5 - 1
        with torch.autocast(DEVICE, torch.bfloat16, enabled=fast_precision() == "bf16"):
            context, mask = encoder(list(captions))
            t = logit_normal_timesteps(len(x0), len(diffusion), generator)
            loss = diffusion.loss(network, x0, t, context, mask, generator).mean()
        loss.backward()
        for optimizer, _ in optimizers:
            if optimize:
                optimizer.step()
            optimizer.zero_grad()
        yield


# ------------------------------------------------------------------ cost of a step


def measure_steps(store, rounds: int, steps: int) -> list[dict]:
    """Return a row per loop: the median milliseconds of a step over rounds in which all take turns.

    steps: of each loop in each round.
    """
    loops = {
        "ours, Muon": run_ours(store),
        "bare, Muon": run_bare(store),
        "ours, AdamW": run_ours(store, muon_learning_rate=None),
        "bare, AdamW": run_bare(store, muon_learning_rate=None),
        "diffusers' way, AdamW": run_diffusers_way(store),
        "forward and backward alone": run_bare(store, optimize=False),
    }
    # Read all images once, so that no loop pays for the first access to the disk.
    for _ in make_loader(store, presets.BATCH):
        pass

    seconds = {name: [] for name in loops}
    for round_index in tqdm(range(rounds + 1), desc="training loops in turn", unit="round"):
        for name, loop in loops.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                next(loop)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_index > 0:             # the first round is for warm-up
                seconds[name].append((time.perf_counter() - start) / steps)
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append({
            "loop": name,
            "ms per step": 1000 * median,
            "images/s": presets.BATCH / median,
        })
    return rows


# ------------------------------------------------------------------ time to the goal


def measure_time_to_goal(
    name: str, loop, classifier, names: list[str], size: int, interval: float, progress_bar
) -> dict:
    """Return a row with the minutes of training after which GOAL was reached (None: not reached).

    interval: seconds of training between two measurements of the prompt accuracy of `names`.
    """
    best = 0.0
    measured_at = 0.0       # seconds
    minutes = None
    for step in loop:
        progress_bar.update(1)
        if step.seconds > measured_at + interval:
            measured_at = step.seconds
            network, encoder = step.get_ema()
            accuracy = measure_fidelity(
                classifier, network, encoder, step.diffusion, names, size
            )
            best = max(best, accuracy)
            progress_bar.write(
                f"{name}: prompt accuracy {accuracy:.1%} after {step.seconds / 60:.1f} minutes"
            )
            if accuracy >= GOAL:
                minutes = step.seconds / 60
                break
    return {
        "loop": name,
        "minutes to 80%": minutes,
        "minutes at most": step.seconds / 60,
        "best fidelity": best,
    }


# ------------------------------------------------------------------ GPU only


def measure_precisions(store) -> list[dict]:
    """Return rows of fp32, bf16 and compiled bf16."""
    network, encoder, diffusion = build_networks()
    images, captions = next(iter(make_loader(store, presets.BATCH)))
    x0 = images.float() / 127.5 - 1
    t = torch.zeros(len(images), dtype=torch.int64)
    with FlopCounterMode(display=False) as flop_counter:
        context, mask = encoder(list(captions))
        loss = diffusion.loss(network, x0, t, context, mask, torch.Generator()).mean()
        loss.backward()
    flops = flop_counter.get_total_flops()

    rows = []
    for precision, compiled in (("no", False), ("bf16", False), ("bf16", True)):
        network, encoder, diffusion = build_networks()
        steps = train(
            network,
            diffusion,
            make_loader(store, presets.BATCH),
            encoder,
            steps=120,
            compile=compiled,
            **presets.TRAINING,
            accelerator=make_new_accelerator(precision),
        )
        for _ in itertools.islice(steps, 20):       # warm-up
            pass
        start = time.perf_counter()
        for _ in steps:
            pass
        seconds = (time.perf_counter() - start) / 100
        rows.append({
            "precision": precision,
            "compiled": compiled,
            "ms per step": 1000 * seconds,
            "images/s": presets.BATCH / seconds,
            "fraction of the bf16 matrix rate": flops / seconds / measure_matrix_rate(),
        })
    return rows


def make_new_accelerator(precision: str) -> Accelerator:
    """Make an Accelerator with another precision than the last one.

    A process normally has a single precision; this resets accelerate's shared state.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision)


class FixedContext(torch.nn.Module):
    """An encoder that returns the same context [B, 52, 768], of the size of cn_clip's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("context", torch.randn(1, 52, 768))

    def forward(self, captions):
        context = self.context.expand(len(captions), -1, -1)
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        return context, mask


def find_first_version_batch() -> int:
    """Return the largest power of two that trains the first version's network at 3×128×128."""
    def try_batch_size(batch_size):
        network = UNet.easy_diffusion_2023()
        diffusion = GaussianDiffusion(NoiseSchedule.linear(1000), prediction_type="eps")
        images = torch.zeros(batch_size, 3, 128, 128, dtype=torch.uint8)
        loader = [(images, [""] * batch_size)]
        run_unsplit(train(network, diffusion, loader, FixedContext(), steps=2))

    return find_largest_batch(try_batch_size)


# ------------------------------------------------------------------ the command


def main():
    options = make_parser(
        "training", __doc__, out=Path("out"), minutes=5.0 if DEVICE == "cuda" else 15.0
    ).parse_args()
    quick = options.quick
    size = 32 if quick else presets.SIZE
    minutes = 0.1 if quick else options.minutes

    # Cost of a step
    dish_count = 200 if quick else presets.DISHES
    store = presets.prepare_dishes(options.out / f"dishes_{size}", dish_count, size)
    rows = measure_steps(store, rounds=2 if quick else 15, steps=2 if quick else 10)
    ms = {row["loop"]: row["ms per step"] for row in rows}
    claims = {
        "overhead": ms["ours, Muon"] / ms["bare, Muon"] - 1,
        "overhead_adamw": ms["ours, AdamW"] / ms["bare, AdamW"] - 1,
        "over_forward_backward": ms["ours, AdamW"] / ms["forward and backward alone"] - 1,
        "speedup": ms["diffusers' way, AdamW"] / ms["ours, AdamW"],
    }

    # Classifier
    if quick:
        classifier = dish_classifier.load_or_train_classifier(size, 40, options.out, 1000)
    else:
        classifier = dish_classifier.load_or_train_classifier(size, 2600, options.out)
    test_dishes = dish_classifier.draw_dishes(100 if quick else 2000, size, "held_out", 102)
    accuracy = classify_dishes(classifier, *test_dishes)
    claims["reader_accuracy"] = accuracy
    if accuracy < MIN_CLASSIFIER_ACCURACY and not quick:
        raise SystemExit(
            f"the classifier's accuracy of {accuracy:.1%} is too low to measure samples with"
        )

    # Time to the goal
    names = random.Random(0).sample(dish_names("held_out"), 10 if quick else 200)
    loops = {
        "ours": run_ours(store, minutes),
        "diffusers' way, 1e-4": run_diffusers_way(store, minutes),
    }
    if not quick:
        loops["diffusers' way, 1e-3"] = run_diffusers_way(store, minutes, 1e-3)
    goals = []
    with tqdm(desc="to 80%", unit="step") as progress_bar:
        for name, loop in loops.items():
            goals.append(measure_time_to_goal(
                name, loop, classifier, names, size, 6 * minutes, progress_bar
            ))
    # A loop that never reached the goal counts with the longest time, so the speedup is at least
    # this.
    goal_minutes = [row["minutes to 80%"] or row["minutes at most"] for row in goals]
    claims["time_to_80_speedup"] = min(goal_minutes[1:]) / goal_minutes[0]

    more_tables = {"goal": goals}
    if DEVICE == "cuda":
        more_tables["precision"] = measure_precisions(store)
        claims["largest_batch_128"] = find_first_version_batch()
    finish("training", claims, rows, quick, **more_tables)


if __name__ == "__main__":
    main()
