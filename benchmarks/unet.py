"""Time of a UNet step beside diffusers' UNet2DConditionModel: python -m benchmarks.unet [--quick]

Both networks have the same weights. Measured are a training step (loss, backward pass, AdamW) and a
step of guided sampling, with captions of 5 to 10 tokens out of 52 for the conditional half of the
batch and the empty caption for the unconditional half. Both networks compute in bfloat16 and take
turns in one run.

FLOPs are counted, and the rate of matrix multiplication is measured between the steps, which gives
the fraction of that rate which a training step reaches. On a GPU everything is also measured with
torch.compile.
"""

import statistics
import tempfile
import time

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.prediction import Denoiser, Prediction
from easy_diffusion.networks.fast_unet import FastUNet
from easy_diffusion.networks.stable_diffusion_weights import save_stable_diffusion
from easy_diffusion.networks.unet import UNet

from .report import finish, make_parser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 52         # length and dimension of cn_clip's token embeddings
DIM = 768
GUIDANCE = 4.0

NETWORKS = {        # name: (arguments of UNet, side of the image, batch size in training)
    "64/128/128, 3×32×32": (
        dict(channels=(64, 128, 128), attention=(False, True, True), heads=8),
        32,
        32,
    ),
    "64/128/256, 3×32×32": (
        dict(channels=(64, 128, 256), attention=(False, True, True), heads=8),
        32,
        32,
    ),
    "64/128, 48×16×16, as the demo's patches": (
        dict(
            in_channels=48,
            out_channels=48,
            channels=(64, 128),
            attention=(False, True),
            heads=4,
        ),
        16,
        32,
    ),
    "Stable Diffusion's layout at a fifth of its width, 4×32×32": (
        dict(
            in_channels=4,
            out_channels=4,
            channels=(64, 128, 256, 256),
            attention=(True, True, True, False),
            heads=8,
        ),
        32,
        8,
    ),
}


def measure_seconds(function) -> float:
    """Return the seconds that function() takes, including its work on the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_matrix_rate() -> float:
    """Measure the FLOP/s of the product of two bf16 matrices, 2048² on a CPU, 8192² on a GPU."""
    side = 8192 if DEVICE == "cuda" else 2048
    matrix = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    matrix @ matrix     # warm-up

    def multiply_four_times():
        for _ in range(4):
            matrix @ matrix

    return 4 * 2 * side**3 / measure_seconds(multiply_four_times)


def build_pair(options: dict) -> tuple[UNet, UNet2DConditionModel]:
    """Build our network, with random weights everywhere, and diffusers' with the same weights."""
    torch.manual_seed(0)
    network = UNet(context_dim=DIM, **options)
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        save_stable_diffusion(network, folder)
        peer = UNet2DConditionModel.from_pretrained(folder)
    return network.to(DEVICE), peer.to(DEVICE)


def build_steps(network: UNet, peer: UNet2DConditionModel, shape: tuple, compiled: bool) -> dict:
    """Build the functions to measure, without arguments.

    shape: of a training batch, [B, C, H, W]; guided sampling has half as many images.
    Returns {(whose, kind): function}, with whose "ours" or "diffusers" and kind "train" or
    "sample".
    """
    # Data: the first half of the batch has captions, the second half the empty caption.
    batch_size = shape[0]
    half = batch_size // 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DEVICE)
    target = torch.randn(shape, generator=generator).to(DEVICE)
    context = torch.randn(batch_size, TOKENS, DIM, generator=generator).to(DEVICE)
    t = torch.randint(1000, (batch_size,), generator=generator).to(DEVICE)
    caption_lengths = torch.randint(5, 11, (half,), generator=generator)
    lengths = torch.cat([caption_lengths, torch.ones(half)]).to(DEVICE)
    mask = torch.arange(TOKENS, device=DEVICE) < lengths[:, None]       # [B, 52]
    x_sampling = x[:half]
    t_sampling = torch.full((half,), 500, device=DEVICE)

    def make_train_step(module, predict):
        optimizer = torch.optim.AdamW(module.parameters(), 1e-5, fused=True)

        def train_step():
            with torch.autocast(DEVICE, torch.bfloat16):
                output = predict(x, t, context, mask)
            loss = (output.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train_step

    def make_sample_step(guided_prediction):
        def sample_step():
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                return guided_prediction(x_sampling, t_sampling)

        return sample_step

    # Ours
    ours = torch.compile(network) if compiled else network
    fast = torch.compile(FastUNet(network)) if compiled else FastUNet(network)

    def to_prediction(output, x_t, t):
        return Prediction(output, output)

    denoise_cond = Denoiser(fast, to_prediction, context[:half], mask[:half])
    denoise_uncond = Denoiser(fast, to_prediction, context[half:], mask[half:])
    denoise = guided(denoise_cond, denoise_uncond, GUIDANCE)

    def guided_ours(x, t):
        return denoise(x, t).x0

    # diffusers, as its pipelines compute guidance
    theirs = torch.compile(peer) if compiled else peer

    def predict_theirs(x, t, context, mask):
        return theirs(x, t, context, encoder_attention_mask=mask).sample

    def guided_theirs(x, t):
        output = predict_theirs(torch.cat([x, x]), torch.cat([t, t]), context, mask)
        output_cond, output_uncond = output.chunk(2)
        return output_uncond + GUIDANCE * (output_cond - output_uncond)

    return {
        ("ours", "train"): make_train_step(network, ours),
        ("ours", "sample"): make_sample_step(guided_ours),
        ("diffusers", "train"): make_train_step(peer, predict_theirs),
        ("diffusers", "sample"): make_sample_step(guided_theirs),
    }


def measure(name: str, rounds: int, compiled: bool, progress_bar) -> dict:
    """Return the row of one network: milliseconds of both, their ratios, FLOPs, matrix rate."""
    options, side, batch_size = NETWORKS[name]
    network, peer = build_pair(options)
    modules = {"ours": network.eval(), "diffusers": peer.eval()}
    shape = (batch_size, options.get("in_channels", 3), side, side)
    steps = build_steps(network, peer, shape, compiled)

    # Check that both compute the same. Guidance multiplies the rounding errors of bf16 by four.
    expected = steps["diffusers", "sample"]()
    difference = (steps["ours", "sample"]() - expected).abs().max() / expected.std()
    if difference > 0.5:
        raise RuntimeError(
            f"{name}: the two networks differ by {difference:.2f} of their standard deviation"
        )
    with FlopCounterMode(display=False) as flop_counter:
        steps["ours", "train"]()
    flops = flop_counter.get_total_flops()

    # Rounds in which all take turns; the first is for warm-up.
    seconds = {key: [] for key in steps}
    rates = []
    for round_index in range(rounds + 1):
        for kind in ("train", "sample"):
            for whose in ("ours", "diffusers"):
                modules[whose].train(kind == "train")
                step = steps[whose, kind]
                if kind == "sample":
                    step()      # the first step of a sampling loop; it caches keys and values
                duration = measure_seconds(step)
                if round_index > 0:
                    seconds[whose, kind].append(duration)
        rates.append(measure_matrix_rate())
        progress_bar.update()

    ms = {key: 1000 * statistics.median(values) for key, values in seconds.items()}
    rate = statistics.median(rates)
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {
        "network": name + (", compiled" if compiled else ""),
        "M weights": weights / 1e6,
        "GFLOP per training step": flops / 1e9,
        "train ms": ms["ours", "train"],
        "train ms, diffusers": ms["diffusers", "train"],
        "train speedup": ms["diffusers", "train"] / ms["ours", "train"],
        "guided step ms": ms["ours", "sample"],
        "guided step ms, diffusers": ms["diffusers", "sample"],
        "sample speedup": ms["diffusers", "sample"] / ms["ours", "sample"],
        "fraction of matrix rate": flops / rate / ms["ours", "train"] * 1000,
        "matrix GFLOP/s": rate / 1e9,
    }


def main():
    quick = make_parser("unet", __doc__).parse_args().quick
    names = list(NETWORKS)[2:3] if quick else list(NETWORKS)
    rounds = 2 if quick else 9
    variants = [False, True] if DEVICE == "cuda" and not quick else [False]

    rows = []
    with tqdm(total=len(names) * len(variants) * (rounds + 1), unit="round") as progress_bar:
        for name in names:
            for compiled in variants:
                rows.append(measure(name, rounds, compiled, progress_bar))
    claims = {
        "train_speedup": rows[0]["train speedup"],
        "sample_speedup": rows[0]["sample speedup"],
        "share_of_matrix_rate": rows[0]["fraction of matrix rate"],
    }
    finish("unet", claims, rows, quick)


if __name__ == "__main__":
    main()
