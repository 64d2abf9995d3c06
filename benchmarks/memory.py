"""Memory and time of a training step: python -m benchmarks.memory [--quick]

The network of the project's first version (93 M weights, images 3×128×128, context [52, 768]) is
trained in bfloat16, with the simple loss and with the hybrid loss of a learned variance (VLB), with
and without checkpointing.

"MB kept per sample" are the tensors that are stored for the backward pass, counted one by one
(saved-tensor hooks, and the inputs of checkpointed blocks): the difference between a batch of two
and a batch of one. "Peak MB per sample" and "batch within 32 GB" are measured on the process. On a
CPU its largest resident size with batches of 4 and of 12 is extrapolated linearly to 32 GB. On a
GPU the largest batch is searched that trains within 32 GB, to 3%.

A second table shows how time and memory grow with the side of the image and the width of the
network.
"""

import json
import subprocess
import sys
import time
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks import unet
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.memory import find_largest_batch, peak_memory

from .report import finish, make_parser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 32e9        # bytes


def build_first_version(vlb: bool, checkpointing: bool) -> UNet:
    """Build the network of the first version; vlb: with a learned variance."""
    return UNet.easy_diffusion_2023(learned_variance=vlb, checkpointing=checkpointing)


def make_training(network: UNet, side: int, vlb: bool, tokens: int = 52) -> tuple:
    """Make two functions: batch size → None, one training step; and batch size → its loss.

    side: height and width of the random images. vlb: train a learned variance with the hybrid
    loss. tokens: length of the random context.
    """
    variance = "learned_range" if vlb else "fixed_small"
    diffusion = GaussianDiffusion(NoiseSchedule.linear(1000), variance=variance)
    network = network.to(DEVICE).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=True)

    def compute_loss(batch_size):
        x0 = torch.rand(batch_size, 3, side, side, device=DEVICE) * 2 - 1
        context = torch.randn(batch_size, tokens, network.context_dim, device=DEVICE)
        t = torch.randint(1000, (batch_size,), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            return diffusion.loss(network, x0, t, context).mean()

    def train_step(batch_size):
        try:
            compute_loss(batch_size).backward()
            optimizer.step()
        finally:                        # frees the gradients, also after an out-of-memory error
            optimizer.zero_grad()

    return train_step, compute_loss


def count_kept_bytes(network: UNet, compute_loss, batch_size: int) -> int:
    """Return the bytes that are stored for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storage_sizes = {}                  # address → bytes
    checkpoint = unet.checkpoint

    def record(tensor):
        storage = tensor.untyped_storage()
        storage_sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def recorded_checkpoint(function, *inputs, **options):
        for value in inputs:
            if isinstance(value, torch.Tensor):
                record(value)
        return checkpoint(function, *inputs, **options)

    with (
        mock.patch.object(unet, "checkpoint", recorded_checkpoint),
        saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        # As long as the loss exists, no address is used twice.
        loss = compute_loss(batch_size)
    kept_bytes = sum(
        size for address, size in storage_sizes.items() if address not in weights
    )
    del loss
    return kept_bytes


def measure_seconds(train_step, batch_size: int, repetitions: int) -> float:
    """Return the duration of the fastest of several steps, after one warm-up step."""
    durations = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        train_step(batch_size)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return min(durations[1:])


def run_in_new_process(function, *arguments):
    """Call a function of this file in a new process, whose memory is empty; returns its result."""
    program = (
        "import json; from benchmarks import memory; "
        f"print(json.dumps(memory.{function.__name__}(*{arguments!r})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


# ------------------------------------------------------------------ the peak of a process


def measure_peak(vlb: bool, checkpointing: bool, batch_size: int) -> int:
    """Return the largest resident size in bytes of this process after two training steps."""
    train_step, _ = make_training(build_first_version(vlb, checkpointing), 128, vlb)
    train_step(batch_size)
    train_step(batch_size)
    return peak_memory()


def extrapolate_peak(vlb: bool, checkpointing: bool, quick: bool) -> tuple[float, int]:
    """Return the bytes per sample of the peak on a CPU, and the batch size that reaches 32 GB."""
    small, large = (2, 4) if quick else (4, 12)
    small_peak = run_in_new_process(measure_peak, vlb, checkpointing, small)
    large_peak = run_in_new_process(measure_peak, vlb, checkpointing, large)
    bytes_per_sample = (large_peak - small_peak) / (large - small)
    return bytes_per_sample, int((LIMIT - small_peak) / bytes_per_sample) + small


def find_gpu_batch_size(vlb: bool, checkpointing: bool) -> int:
    """Return the largest batch size that this GPU trains within 32 GB, to 3%; 0 if it has less."""
    total = torch.cuda.get_device_properties(0).total_memory
    if total < LIMIT:
        return 0
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    train_step, _ = make_training(build_first_version(vlb, checkpointing), 128, vlb)
    return find_largest_batch(train_step, max_batch=4096, within=1 / 32)


# ------------------------------------------------------------------ rows


def measure_first_version(vlb: bool, checkpointing: bool, quick: bool) -> dict:
    """Return a row of the first table."""
    # Before this process builds a network: on Linux a child's peak includes its parent's size.
    peak_bytes = None
    if DEVICE == "cpu":
        peak_bytes, batch_size = extrapolate_peak(vlb, checkpointing, quick)
    else:
        batch_size = run_in_new_process(find_gpu_batch_size, vlb, checkpointing)
    network = build_first_version(vlb, checkpointing)
    train_step, compute_loss = make_training(network, 128, vlb)
    kept_bytes = count_kept_bytes(network, compute_loss, 2)
    kept_bytes -= count_kept_bytes(network, compute_loss, 1)
    row = {
        "network": f"first version, 3×128×128, {'with' if vlb else 'without'} VLB",
        "checkpointing": checkpointing,
        "MB kept per sample": kept_bytes / 1e6,
        "seconds per sample": measure_seconds(train_step, 2, 1 if quick else 3) / 2,
    }
    if peak_bytes is not None:
        row["peak MB per sample"] = peak_bytes / 1e6
    row["batch within 32 GB"] = batch_size
    return row


def measure_growth(side: int, width: int, quick: bool) -> dict:
    """Return a row of the second table. width: channels of the finest level."""
    network = UNet(
        channels=(width, 2 * width, 4 * width), attention=(False, False, True), context_dim=128
    )
    train_step, compute_loss = make_training(network, side, vlb=False, tokens=12)
    batch_size = max(1, 256 // side)
    with FlopCounterMode(display=False) as flop_counter:
        train_step(1)
    weights = sum(parameter.numel() for parameter in network.parameters())
    seconds = measure_seconds(train_step, batch_size, 1 if quick else 3)
    kept_bytes = count_kept_bytes(network, compute_loss, 2)
    kept_bytes -= count_kept_bytes(network, compute_loss, 1)
    return {
        "side": side,
        "width": width,
        "M weights": weights / 1e6,
        "GFLOP per sample": flop_counter.get_total_flops() / 1e9,
        "ms per sample": 1000 * seconds / batch_size,
        "MB kept per sample": kept_bytes / 1e6,
    }


def main():
    quick = make_parser("memory", __doc__).parse_args().quick
    if quick:
        variants = [(True, True)]
        sides = (32, 64)
    else:
        variants = [(False, False), (False, True), (True, False), (True, True)]
        sides = (32, 64, 128, 256)
    sizes = [(side, width) for side in sides for width in (64, 128)]

    rows = []
    growth = []
    with tqdm(total=len(variants) + len(sizes), unit="network") as progress_bar:
        for vlb, checkpointing in variants:
            rows.append(run_in_new_process(measure_first_version, vlb, checkpointing, quick))
            progress_bar.update()
        for side, width in sizes:
            growth.append(run_in_new_process(measure_growth, side, width, quick))
            progress_bar.update()

    checkpointed = rows[-1]             # with VLB, with checkpointing
    claims = {
        "bytes_per_sample_vlb": round(1e6 * checkpointed["MB kept per sample"]),
        "largest_batch_32gb_vlb": checkpointed["batch within 32 GB"],
    }
    if not quick:
        plain = rows[-2]                # with VLB, without checkpointing
        claims["bytes_per_sample_vlb_without_checkpointing"] = round(
            1e6 * plain["MB kept per sample"]
        )
        claims["slowdown_of_checkpointing"] = (
            checkpointed["seconds per sample"] / plain["seconds per sample"]
        )
    finish("memory", claims, rows, quick, growth=growth)


if __name__ == "__main__":
    main()
