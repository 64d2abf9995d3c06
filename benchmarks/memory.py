"""What a training step keeps in memory: python -m benchmarks.memory [--quick]

The network of the project's first version (93 M weights, 3×128×128, 52 words of 768), trained in bf16 with the simple loss and with the
hybrid one of a learned variance, with and without checkpointing. What is kept for the gradient is counted tensor by tensor (saved-tensor
hooks, and the inputs of checkpointed blocks); a sample's share is the difference between batches of two and of one. The peak is the
process's own: on a CPU its largest resident size with batches of 4 and of 12, carried on to 32 GB in a straight line; on a GPU the
largest batch, within 3%, that was trained with 32 GB. A second table says how time and memory grow with the picture's side and the
network's width.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

import easy_diffusion.networks.unet
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.unet import UNet

from .report import finish

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 32e9


def first_version(vlb: bool, checkpointing: bool):
    return UNet.easy_diffusion_2023(learned_variance=vlb, checkpointing=checkpointing)


def training(network, side: int, vlb: bool, words: int = 52):
    """The function batch -> None that trains the network for a step, and the function batch -> loss inside it."""
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000), variance="learned_range" if vlb else "fixed_small")
    network = network.to(DEVICE).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=True)

    def loss(batch):
        x0, context = torch.rand(batch, 3, side, side, device=DEVICE) * 2 - 1, torch.randn(batch, words, network.context_dim, device=DEVICE)
        t = torch.randint(1000, (batch,), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            return diffusion.loss(network, x0, t, context).mean()

    def step(batch):
        try:
            loss(batch).backward()
            optimizer.step()
        finally:                                                            # also where the memory does not suffice
            optimizer.zero_grad()

    return step, loss


def kept(network, loss, batch: int) -> int:
    """Bytes kept for the gradient of loss(batch), the weights themselves left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages, checkpoint = {}, easy_diffusion.unet.computed_again

    def note(y):
        storages[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    def noted_checkpoint(function, *inputs, **options):
        for y in inputs:
            if isinstance(y, torch.Tensor):
                note(y)
        return checkpoint(function, *inputs, **options)

    with mock.patch.object(easy_diffusion.unet, "computed_again", noted_checkpoint), saved_tensors_hooks(note, lambda y: y):
        alive = loss(batch)                                                 # while it lives, no storage is given away twice
    total = sum(size for place, size in storages.items() if place not in weights)
    del alive
    return total


def seconds_of(step, batch: int, times: int) -> float:
    """The fastest of `times` steps, after one to warm up."""
    best = float("inf")
    for turn in range(times + 1):
        start = time.perf_counter()
        step(batch)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if turn else best
    return best


def apart(function, *arguments):
    """What a function of this file returns in a process of its own, which begins with empty memory."""
    program = f"import json; from benchmarks import memory; print(json.dumps(memory.{function.__name__}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(vlb: bool, checkpointing: bool, batch: int) -> int:
    """The largest resident size in bytes of this process after two steps of training."""
    step, _ = training(first_version(vlb, checkpointing), 128, vlb)
    step(batch)
    step(batch)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def largest_batch(trains, at_most: int = 4096) -> int:
    """The largest batch for which trains(batch) is true, within 3%: doubled until it fails, then halved in between."""
    good, bad = 0, 1
    while bad <= at_most and trains(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 32):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if trains(middle) else (good, middle)
    return good


def largest_batch_of(vlb: bool, checkpointing: bool) -> int:
    """The largest batch that this GPU trains with no more than 32 GB; 0 if it has less."""
    if torch.cuda.get_device_properties(0).total_memory < LIMIT:
        return 0
    torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.get_device_properties(0).total_memory)
    step, _ = training(first_version(vlb, checkpointing), 128, vlb)

    def trains(batch):
        try:
            step(batch)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    return largest_batch(trains)


def carried_on(vlb: bool, checkpointing: bool, quick: bool) -> tuple[float, int]:
    """Bytes that a sample adds to the peak on a CPU, and the batch at which a straight line through two peaks reaches 32 GB."""
    small, large = (2, 4) if quick else (4, 12)
    low, high = (apart(peak_of, vlb, checkpointing, batch) for batch in (small, large))
    each = (high - low) / (large - small)
    return each, int((LIMIT - low) / each) + small


def first_version_row(vlb: bool, checkpointing: bool, quick: bool) -> dict:
    each, largest = carried_on(vlb, checkpointing, quick) if DEVICE == "cpu" else (None, apart(largest_batch_of, vlb, checkpointing))
    network = first_version(vlb, checkpointing)         # only now: Linux lets a child begin with its parent's resident size
    step, loss = training(network, 128, vlb)
    one, two = kept(network, loss, 1), kept(network, loss, 2)
    row = {"network": f"first version, 3×128×128, {'with' if vlb else 'without'} VLB", "checkpointing": checkpointing,
           "MB kept a sample": (two - one) / 1e6, "seconds a sample": seconds_of(step, 2, 1 if quick else 3) / 2}
    return row | ({"peak MB a sample": each / 1e6} if each else {}) | {"batch within 32 GB": largest}


def growth_row(side: int, width: int, quick: bool) -> dict:
    network = UNet(channels=(width, 2 * width, 4 * width), attention=(False, False, True), context_dim=128)
    step, loss = training(network, side, vlb=False, words=12)
    batch = max(1, 256 // side)
    with FlopCounterMode(display=False) as counter:
        step(1)
    return {"side": side, "width": width, "M weights": sum(p.numel() for p in network.parameters()) / 1e6,
            "GFLOP a sample": counter.get_total_flops() / 1e9, "ms a sample": 1000 * seconds_of(step, batch, 1 if quick else 3) / batch,
            "MB kept a sample": (kept(network, loss, 2) - kept(network, loss, 1)) / 1e6}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the lean network and small pictures alone; the figures are not kept")
    quick = parser.parse_args().quick
    kinds = [(True, True)] if quick else [(vlb, checkpointing) for vlb in (False, True) for checkpointing in (False, True)]
    sizes = [(side, width) for side in ((32, 64) if quick else (32, 64, 128, 256)) for width in (64, 128)]
    with tqdm(total=len(kinds) + len(sizes), unit="network") as bar:
        rows, growth = [], []
        for function, table, of in ((first_version_row, rows, kinds), (growth_row, growth, sizes)):
            for arguments in of:
                table.append(apart(function, *arguments, quick))
                bar.update()
    lean = rows[-1]
    claims = {"bytes_per_sample_vlb": round(1e6 * lean["MB kept a sample"]), "largest_batch_32gb_vlb": lean["batch within 32 GB"]}
    if not quick:
        claims |= {"bytes_per_sample_vlb_without_checkpointing": round(1e6 * rows[-2]["MB kept a sample"]),
                   "slowdown_of_checkpointing": lean["seconds a sample"] / rows[-2]["seconds a sample"]}
    finish("memory", claims, rows, quick, growth=growth)


if __name__ == "__main__":
    main()
