"""What a training step and a sampling step cost: python -m benchmarks.step [--quick] [--compile]

A small network leaves a GPU idle, because the CPU takes tens of µs to start an operation. So
operations count more than FLOPs. Measured are

    training        a step of `train` with the demo's network, encoder, Muon and EMA, 64×64 pixels;
                    on a GPU as a CUDA graph ("ours"), without one ("ours, eager") and, with
                    --compile, compiled in a graph ("ours, compiled")
    guided sampling a step of the demo's sampler for one image; on a GPU with a CUDA graph, too
    UNet training   forward, backward and AdamW of a UNet on the demo's patches (48×16×16), ours
                    and diffusers' with the same weights
    UNet sampling   a step of guided sampling with these two, for half as many images

Columns: `ms` is the median of several steps, for which all take turns. `operations` are those that
PyTorch starts, without views and allocations. On a GPU `launches` are the calls that start a
kernel or a graph, `busy` is the fraction of the time in which a kernel runs, and `waits` counts how
often the CPU waits for the GPU. On a CPU only batches of 32 are measured.
"""

import statistics
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from datasets.dishes import dish_names
from easy_diffusion import generate, presets
from easy_diffusion.training.muon import Muon
from easy_diffusion.training.operations import count_operations
from easy_diffusion.training.trainer import train

from .report import finish, make_parser
from .unet import DEVICE, NETWORKS, build_pair, build_steps, measure_seconds

BATCHES = (32, 256, 1024) if DEVICE == "cuda" else (32,)
PATCHES = "64/128, 48×16×16, as the demo's patches"


def profile_gpu(function) -> dict:
    """Return launches, kernels, fraction of the time that the GPU is busy, and waits."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds = measure_seconds(function)
    on_gpu = torch.autograd.DeviceType.CUDA
    events = profiler.events()
    kernels = [event.time_range for event in events if event.device_type == on_gpu]
    names = [event.name for event in events if event.device_type != on_gpu]

    # The union of the kernels' intervals, in microseconds.
    busy, end = 0.0, 0.0
    for interval in sorted(kernels, key=lambda interval: interval.start):
        busy += max(0.0, interval.end - max(interval.start, end))
        end = max(end, interval.end)
    return {
        "launches": sum("LaunchKernel" in name or "GraphLaunch" in name for name in names),
        "kernels": len(kernels),
        "busy": busy / (1e6 * seconds),
        # One wait is the measurement's own.
        "waits": sum("Synchronize" in name for name in names) - 1,
    }


def make_demo_step(batch_size: int, **options):
    """Build a function that takes one step of the demo's training, which has begun."""
    names = dish_names("train")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, 64, 64), dtype=torch.uint8, generator=generator)
    if DEVICE == "cuda":
        images = images.pin_memory()
    captions = [names[i % len(names)] for i in range(batch_size)]
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("".join(names))
    steps = train(
        network, diffusion, [(images, captions)], encoder, steps=100_000,
        **presets.TRAINING, **options,
    )
    return lambda: next(steps)


def make_sampling_step():
    """Build a function that evaluates the demo's denoiser with guidance for one image."""
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    models = network.to(DEVICE).eval(), encoder.to(DEVICE).eval()
    denoise = generate.guided_denoiser(*models, diffusion, ["番茄炒鸡蛋"], guidance=2.0)
    x_t, t = torch.randn(1, 3, 64, 64, device=DEVICE), torch.tensor([500], device=DEVICE)
    return torch.no_grad()(lambda: denoise(x_t, t))


def measure(batch_size: int, rounds: int, compiled: bool) -> list[dict]:
    """Return the rows of one batch size."""
    options, side, _ = NETWORKS[PATCHES]
    network, peer = build_pair(options)
    unet_steps = build_steps(
        network, peer, (batch_size, options["in_channels"], side, side), compiled=False
    )
    modules = {"ours": network, "diffusers": peer}
    functions = {("training", "ours"): make_demo_step(batch_size)}
    if DEVICE == "cuda":
        functions["training", "ours, eager"] = make_demo_step(batch_size, graphs=False)
    if compiled:
        functions["training", "ours, compiled"] = make_demo_step(batch_size, compile=True)
    if batch_size == BATCHES[0]:
        functions["guided sampling", "ours"] = make_sampling_step()
        if DEVICE == "cuda":
            with patch.object(generate, "CudaGraphs", lambda function, *_, **__: function):
                functions["guided sampling", "ours, eager"] = make_sampling_step()
    for (whose, kind), function in unet_steps.items():
        functions["UNet training" if kind == "train" else "UNet sampling", whose] = function

    def warm_up(step, whose):
        """Choose the module's mode, and fill its caches, which a training step invalidates."""
        if whose in modules:
            modules[whose].train("training" in step)
        functions[step, whose]()

    seconds = {key: [] for key in functions}
    for _ in tqdm(range(rounds + 1), desc=f"batch {batch_size}", unit="round"):
        for key, function in functions.items():
            warm_up(*key)
            seconds[key].append(measure_seconds(function))
    rows = []
    for (step, whose), function in functions.items():
        warm_up(step, whose)
        ms = 1000 * statistics.median(seconds[step, whose][1:])
        batch = 1 if step == "guided sampling" else batch_size
        images = batch_size // 2 if step == "UNet sampling" else batch
        rows.append({
            "step": step,
            "by": whose,
            "batch": batch,
            "ms": ms,
            "images/s": 1000 * images / ms,
            "operations": count_operations(function).total(),
        })
        if DEVICE == "cuda":
            rows[-1] |= profile_gpu(function)
    return rows


def count_muon_operations() -> int:
    """Return the operations of one step of Muon for the demo's network and encoder."""
    network, encoder, _ = presets.build_networks("".join(dish_names("train")))
    parameters = [*network.parameters(), *encoder.parameters()]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    optimizer = Muon(matrices)
    optimizer.step()            # creates the momenta
    return count_operations(optimizer.step).total()


def count_graph_breaks() -> int:
    """Return the graph breaks of torch.compile in the demo's network, loss and encoder."""
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    tokens = encoder.tokenize(["番茄炒鸡蛋", "土豆汤"])
    context, mask = encoder.encode(tokens)
    x, t = torch.randn(2, 3, 64, 64), torch.tensor([0, 999])
    breaks = 0
    for function, arguments in (
        (network, (x, t, context, mask)),
        (diffusion.loss, (network, x, t, context, mask)),
        (encoder.encode, (tokens,)),
    ):
        torch._dynamo.reset()
        breaks += torch._dynamo.explain(function)(*arguments).graph_break_count
    return breaks


def main():
    parser = make_parser("step", __doc__)
    parser.add_argument(
        "--compile", action="store_true",
        help="also a compiled network, which takes a minute or two more for each batch size",
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    rows = []
    for batch_size in BATCHES[:1] if quick else BATCHES:
        rows += measure(batch_size, rounds=2 if quick else 9, compiled=arguments.compile)

    by_key = {(row["step"], row["by"], row["batch"]): row for row in rows}
    demo = by_key["training", "ours", 32]
    eager = by_key.get(("training", "ours, eager", 32), demo)
    claims = {
        "ops_per_step": eager["operations"],
        "muon_ops": count_muon_operations(),
        "graph_breaks": count_graph_breaks(),
        "speedup_32": (
            by_key["UNet training", "diffusers", 32]["ms"]
            / by_key["UNet training", "ours", 32]["ms"]
        ),
        "sampling_speedup": (
            by_key["UNet sampling", "diffusers", 32]["ms"]
            / by_key["UNet sampling", "ours", 32]["ms"]
        ),
    }
    if DEVICE == "cuda":
        claims["launches_per_step"] = demo["launches"]
        claims["graph_speedup_32"] = eager["ms"] / demo["ms"]
        claims["sampling_ms"] = by_key["guided sampling", "ours", 1]["ms"]
    if DEVICE == "cuda" and not quick:
        claims["images_per_second_256"] = by_key["training", "ours", 256]["images/s"]
        claims["busy_256"] = by_key["training", "ours", 256]["busy"]
    finish("step", claims, rows, quick)


if __name__ == "__main__":
    main()
