"""What our loop costs and how soon it draws well: python -m benchmarks.training [--quick]

Three loops train the demo's network and encoder on the demo's store, turn by turn in one process: ours, as the demo calls it; one as
diffusers' train_text_to_image.py has it (accelerate's prepare, accumulate and backward, AdamW, its scheduler of rates, EMAModel, uniform
timesteps, MSE of v); and the bare minimum, a batch, noise, forward, backward and our optimizers' steps. Ours and the bare one run with
Muon, as the demo's, and with AdamW alone, as the peer's; a last row is forward and backward alone. `overhead` is what our step takes
longer than the bare one, `overhead_adamw` the same with AdamW alone and `over_forward_backward` over the last row; `speedup` is the
peer's step over ours.

Then ours and the peer's train anew, until a reader finds 80% of the held-out names fully right, or the minutes are over. The peer takes
its published rate of 1e-4 or, in a second row, ten times as much, 1e-3. On a GPU a last table compares fp32, bf16
and torch.compile, with the share of the matrix rate, and asks for the largest batch of the first version's network at 3×128×128.
"""

import argparse
import itertools
import random
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from datasets.dishes import attributes, dish_names
from easy_diffusion import presets
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.timesteps import logit_normal_timesteps
from easy_diffusion.evaluation.attribute_classifier import prompt_accuracy
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.data_loader import infinite_batches, make_loader
from easy_diffusion.training.distributed import fast_precision
from easy_diffusion.training.memory import find_largest_batch, run_unsplit
from easy_diffusion.training.optimizers import build_optimizers
from easy_diffusion.training.trainer import train

from .fidelity import LEAST_READER_ACCURACY, drawings, fidelity, trained_reader
from .report import finish
from .unet import matrix_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOAL = 0.8


def parts():
    torch.manual_seed(0)
    return presets.build_networks("".join(dish_names("train")))


def ours(store, minutes=1e6, **changes):
    """Yields (network, encoder, diffusion, seconds) after each step, the averages."""
    network, encoder, diffusion = parts()
    for step in presets.train_demo(network, encoder, diffusion, store, None, minutes, **changes):
        yield step.network, step.encoder, diffusion, step.seconds


def diffusers_way(store, minutes=1e6, learning_rate=1e-4):
    """The same of the peer's loop; its network and encoder are ours, and our samplers draw with them."""
    network, encoder, _ = parts()
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), prediction_type="v")
    noise_scheduler = DDPMScheduler(1000, trained_betas=diffusion.schedule.betas.float().numpy(), prediction_type="v_prediction")
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision=fast_precision())
    weights = [*network.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates = get_scheduler("constant_with_warmup", optimizer=optimizer, num_warmup_steps=100)
    network, encoder, optimizer, loader, rates = accelerator.prepare(network, encoder, optimizer, make_loader(store, presets.BATCH), rates)
    averages = [EMAModel(module.parameters(), decay=presets.TRAINING["ema"]) for module in (network, encoder)]
    for average in averages:
        average.to(accelerator.device)
    start, paused = time.perf_counter(), 0.0
    shown_network, shown_encoder, _ = parts()
    for pictures, captions in infinite_batches(loader):
        with accelerator.accumulate(network):
            pixels = pictures.to(accelerator.device).float() / 127.5 - 1
            noise = torch.randn_like(pixels)
            timesteps = torch.randint(0, 1000, (len(pixels),), device=pixels.device).long()
            noisy = noise_scheduler.add_noise(pixels, noise, timesteps)
            states, mask = encoder(["" if random.random() < 0.1 else caption for caption in captions])
            target = noise_scheduler.get_velocity(pixels, noise, timesteps)
            answer = network(noisy, timesteps, states, mask)
            loss = torch.nn.functional.mse_loss(answer.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(len(pixels))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        for average, module in zip(averages, (network, encoder)):
            average.step(module.parameters())
        seconds = time.perf_counter() - start - paused
        if seconds > 60 * minutes:
            return
        stopped = time.perf_counter()
        yield (averages, (shown_network, shown_encoder)), None, diffusion, seconds
        paused += time.perf_counter() - stopped


def shown(network, encoder, device):
    """The networks to draw with; the peer's average must be copied into some first."""
    if encoder is None:
        averages, modules = network
        for average, module in zip(averages, modules):
            average.copy_to(module.to(device).parameters())
        network, encoder = (module.eval() for module in modules)
    return network, encoder


def bare(store, optimize=True, muon_learning_rate=presets.TRAINING["muon_learning_rate"]):
    """No average, no clipping, no check, no log: a batch, noise, forward, backward and, if wanted, the optimizers."""
    network, encoder, diffusion = parts()
    network, encoder = network.to(DEVICE).train(), encoder.to(DEVICE).train()
    optimizers = build_optimizers([*network.parameters(), *encoder.parameters()], presets.TRAINING["learning_rate"], muon_learning_rate)
    generator, batch = torch.Generator(DEVICE).manual_seed(0), next(iter(make_loader(store, presets.BATCH)))
    for pictures, captions in infinite_batches(make_loader(store, presets.BATCH)) if optimize else itertools.repeat(batch):
        x0 = pictures.to(DEVICE).float() / 127.5 - 1
        with torch.autocast(DEVICE, torch.bfloat16, enabled=fast_precision() == "bf16"):
            states, mask = encoder(list(captions))
            t = logit_normal_timesteps(len(x0), len(diffusion), generator)
            loss = diffusion.loss(network, x0, t, states, mask, generator).mean()
        loss.backward()
        for optimizer, _ in optimizers:
            if optimize:
                optimizer.step()
            optimizer.zero_grad()
        yield


def speeds(store, rounds, steps) -> list[dict]:
    """Milliseconds of a step of each loop, the median over rounds in which all take their turn."""
    loops = {"ours, Muon": ours(store), "bare, Muon": bare(store), "ours, AdamW": ours(store, muon_learning_rate=None),
             "bare, AdamW": bare(store, muon_learning_rate=None), "diffusers' way, AdamW": diffusers_way(store),
             "forward and backward alone": bare(store, optimize=False)}
    for _ in make_loader(store, presets.BATCH):                                  # whoever reads a picture first should not pay for the disk
        pass
    times = {name: [] for name in loops}
    for turn in tqdm(range(rounds + 1), desc="loops, turn by turn", unit="round"):
        for name, loop in loops.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                next(loop)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name] += [(time.perf_counter() - start) / steps] if turn else []
    return [{"loop": name, "ms a step": 1000 * statistics.median(values), "pictures/s": presets.BATCH / statistics.median(values)}
            for name, values in times.items()]


def time_to_goal(name, loop, reader, names, size, every, bar) -> dict:
    """One row: the minutes of training after which the goal was reached (None: not at all), looked at every `every` seconds."""
    best, looked, minutes = 0.0, 0.0, None
    for network, encoder, diffusion, seconds in loop:
        bar.update(1)
        if seconds > looked + every:
            looked = seconds
            network, encoder = shown(network, encoder, DEVICE)
            best = max(best, right := fidelity(reader, network, encoder, diffusion, names, size))
            bar.write(f"{name}: after {seconds / 60:.1f} minutes {right:.1%} of the held-out names")
            if right >= GOAL:
                minutes = seconds / 60
                break
    return {"loop": name, "minutes to 80%": minutes, "minutes at most": seconds / 60, "best fidelity": best}


def precisions(store, quick) -> list[dict]:
    """On a GPU: fp32, bf16 and compiled bf16, beside the share of the bf16 matrix rate."""
    network, encoder, diffusion = parts()
    pictures, captions = next(iter(make_loader(store, presets.BATCH)))
    with FlopCounterMode(display=False) as counter:
        diffusion.loss(network, pictures.float() / 127.5 - 1, torch.zeros(len(pictures), dtype=torch.int64), *encoder(list(captions)),
                       torch.Generator()).mean().backward()
    rows = []
    for precision, compiled in (("no", False), ("bf16", False), ("bf16", True)):
        network, encoder, diffusion = parts()
        walk = train(network, diffusion, make_loader(store, presets.BATCH), encoder, steps=120, compile=compiled, **presets.TRAINING,
                     accelerator=fresh_accelerator(precision))
        for step in itertools.islice(walk, 20):
            pass
        start = time.perf_counter()
        for step in walk:
            pass
        each = (time.perf_counter() - start) / 100
        rows.append({"precision": precision, "compiled": compiled, "ms a step": 1000 * each, "pictures/s": presets.BATCH / each,
                     "share of the bf16 matrix rate": counter.get_total_flops() / each / matrix_rate()})
    return rows


def fresh_accelerator(precision):
    """A process has one precision; for a comparison it is forgotten in between."""
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision)


class Words(torch.nn.Module):
    """52 states of 768 numbers for any caption, as cn_clip has them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("states", torch.randn(1, 52, 768))

    def forward(self, captions):
        states = self.states.expand(len(captions), -1, -1)
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def largest() -> int:
    """The largest power of two of pictures at 3×128×128 for a training step of the first version's network."""
    def step(count):
        network, diffusion = UNet.easy_diffusion_2023(), GaussianDiffusion(NoiseSchedule.linear(1000), prediction_type="eps")
        loader = [(torch.zeros(count, 3, 128, 128, dtype=torch.uint8), [""] * count)]
        run_unsplit(train(network, diffusion, loader, Words(), steps=2))
    return find_largest_batch(step)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the figures are not kept")
    parser.add_argument("--minutes", type=float, default=5.0 if DEVICE == "cuda" else 15.0, help="of each training, at most")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the drawn dishes and the reader are kept")
    options = parser.parse_args()
    size, minutes, count = (32, 0.1, 10) if options.quick else (presets.SIZE, options.minutes, 200)
    store = presets.prepare_dishes(options.out / f"dishes_{size}", 200 if options.quick else presets.DISHES, size)
    rows = speeds(store, *((2, 2) if options.quick else (15, 10)))
    ms = {row["loop"]: row["ms a step"] for row in rows}
    claims = {"overhead": ms["ours, Muon"] / ms["bare, Muon"] - 1, "overhead_adamw": ms["ours, AdamW"] / ms["bare, AdamW"] - 1,
              "over_forward_backward": ms["ours, AdamW"] / ms["forward and backward alone"] - 1,
              "speedup": ms["diffusers' way, AdamW"] / ms["ours, AdamW"]}

    reader = trained_reader(size, 40, options.out, 1000) if options.quick else trained_reader(size, 2600, options.out)
    pictures, names = drawings(100 if options.quick else 2000, size, "held_out", 102)
    claims["reader_accuracy"] = prompt_accuracy(reader.exact_matches(pictures, [attributes(name) for name in names]))
    if claims["reader_accuracy"] < LEAST_READER_ACCURACY and not options.quick:
        raise SystemExit(f"the reader reads {claims['reader_accuracy']:.1%} of drawings right: it measures nothing")
    names = random.Random(0).sample(dish_names("held_out"), count)
    loops = {"ours": ours(store, minutes), "diffusers' way, 1e-4": diffusers_way(store, minutes)}
    if not options.quick:
        loops["diffusers' way, 1e-3"] = diffusers_way(store, minutes, 1e-3)
    with tqdm(desc="to 80%", unit="step") as bar:
        goals = [time_to_goal(name, loop, reader, names, size, 6 * minutes, bar) for name, loop in loops.items()]
    ours_minutes, *theirs = [row["minutes to 80%"] or row["minutes at most"] for row in goals]
    claims["time_to_80_speedup"] = min(theirs) / ours_minutes               # of those that never got there at least so much
    more = {"goal": goals}
    if DEVICE == "cuda":
        more["precision"] = precisions(store, options.quick)
        claims["largest_batch_128"] = largest()
    finish("training", claims, rows, options.quick, **more)


if __name__ == "__main__":
    main()
