"""What a step costs: python -m benchmarks.unet [--quick]

Our UNet beside diffusers' UNet2DConditionModel with the same weights: a training step (loss, backward, AdamW), and a step of guided
sampling, in which half of the batch has captions of 5 to 10 words out of 52 and the other half the empty one. Both in bf16, turn by
turn in one run. FLOPs are counted, and the matrix-product rate is measured between the steps, so that the share of it can be told.
On a GPU both are measured under torch.compile, too.
"""

import argparse
import statistics
import tempfile
import time

import torch
from diffusers import UNet2DConditionModel
from easy_diffusion.diffusion.prediction import Denoiser, Prediction
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.networks.stable_diffusion_weights import save_stable_diffusion
from easy_diffusion.networks.unet import UNet

from .report import finish

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS, DIM = 52, 768                                                        # cn_clip's
NETWORKS = {        # name: (options, side of the picture, batch of training; half of it in guided sampling)
    "64/128/128, 3×32×32": (dict(channels=(64, 128, 128), attention=(False, True, True), heads=8), 32, 32),
    "64/128/256, 3×32×32": (dict(channels=(64, 128, 256), attention=(False, True, True), heads=8), 32, 32),
    "64/128, 48×16×16, as the demo's patches": (
        dict(in_channels=48, out_channels=48, channels=(64, 128), attention=(False, True), heads=4), 16, 32),
    "Stable Diffusion's layout at a fifth of its width, 4×32×32": (
        dict(in_channels=4, out_channels=4, channels=(64, 128, 256, 256), attention=(True, True, True, False), heads=8), 32, 8)}


def matrix_rate() -> float:
    """FLOP/s of a product of two bf16 matrices, 2048² on a CPU, 8192² on a GPU."""
    side = 8192 if DEVICE == "cuda" else 2048
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    a @ a
    seconds = timed(lambda: [a @ a for _ in range(4)])
    return 4 * 2 * side ** 3 / seconds


def timed(work) -> float:
    """Seconds that `work` takes, the device's queue emptied before and after."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pair(options):
    """Our network, random everywhere, and diffusers' with the same weights."""
    torch.manual_seed(0)
    network = UNet(context_dim=DIM, **options)
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        save_stable_diffusion(network, folder)
        peer = UNet2DConditionModel.from_pretrained(folder)
    return network.to(DEVICE), peer.to(DEVICE)


def works(network, peer, shape, compiled):
    """{"ours": (training step, guided step), "diffusers": (the same)}, functions without arguments."""
    batch, half = shape[0], shape[0] // 2
    g = torch.Generator().manual_seed(0)
    x, target, words = (torch.randn(size, generator=g).to(DEVICE) for size in (shape, shape, (batch, WORDS, DIM)))
    t = torch.randint(1000, (batch,), generator=g).to(DEVICE)
    lengths = torch.cat([torch.randint(5, 11, (half,), generator=g), torch.ones(half)]).to(DEVICE)
    mask = torch.arange(WORDS, device=DEVICE) < lengths[:, None]            # [batch, 52]: captions, then nothing
    some, at = x[:half], torch.full((half,), 500, device=DEVICE)

    def training(module, answer):
        optimizer = torch.optim.AdamW(module.parameters(), 1e-5, fused=True)

        def step():
            with torch.autocast(DEVICE, torch.bfloat16):
                out = answer(x, t, words, mask)
            (out.float() - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    def sampling(guide):
        def step():
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                return guide(some, at)
        return step

    ours, theirs = (torch.compile(network), torch.compile(peer)) if compiled else (network, peer)
    text, nothing = (Denoiser(ours, lambda output, x_t, t: Prediction(output, output), words[part], mask[part])
                     for part in (slice(half), slice(half, None)))
    nothing.to_prediction = text.to_prediction
    guide = guided(text, nothing, 4.0)

    def guide_theirs(x, t):                                                 # as diffusers' pipelines do it
        text, nothing = theirs(torch.cat([x, x]), torch.cat([t, t]), words, encoder_attention_mask=mask).sample.chunk(2)
        return nothing + 4.0 * (text - nothing)

    return {"ours": (training(network, ours), sampling(lambda x, t: guide(x, t).x0)),
            "diffusers": (training(peer, lambda x, t, words, mask: theirs(x, t, words, encoder_attention_mask=mask).sample),
                          sampling(guide_theirs))}


def measure(name, rounds, compiled, bar):
    """One row: milliseconds of both, their ratios, the FLOPs and the share of the matrix rate."""
    options, side, batch = NETWORKS[name]
    network, peer = pair(options)
    shape = (batch, options.get("in_channels", 3), side, side)
    steps = works(network.eval(), peer.eval(), shape, compiled)
    difference = (steps["ours"][1]() - steps["diffusers"][1]()).abs().max() / steps["diffusers"][1]().std()
    if difference > 0.5:                                                    # in bf16, and guidance makes four of each difference
        raise RuntimeError(f"{name}: the two networks differ by {difference:.2f} of their deviation")
    with FlopCounterMode(display=False) as counter:
        steps["ours"][0]()
    seconds, rates = {key: [] for key in ("ours train", "ours sample", "diffusers train", "diffusers sample")}, []
    for turn in range(rounds + 1):                                          # the first round is for warming up
        for kind in ("train", "sample"):
            for who in ("ours", "diffusers"):
                (network if who == "ours" else peer).train(kind == "train")
                if kind == "sample":                                        # the first step of a walk, after which words are remembered
                    steps[who][1]()
                spent = timed(steps[who][kind == "sample"])
                if turn:
                    seconds[f"{who} {kind}"].append(spent)
        rates.append(matrix_rate())
        bar.update()
    ms = {key: 1000 * statistics.median(values) for key, values in seconds.items()}
    flops, rate = counter.get_total_flops(), statistics.median(rates)
    return {"network": name + (", compiled" if compiled else ""), "M weights": sum(p.numel() for p in network.parameters()) / 1e6,
            "GFLOP a training step": flops / 1e9, "train ms": ms["ours train"], "train ms, diffusers": ms["diffusers train"],
            "train speedup": ms["diffusers train"] / ms["ours train"], "guided step ms": ms["ours sample"],
            "guided step ms, diffusers": ms["diffusers sample"], "sample speedup": ms["diffusers sample"] / ms["ours sample"],
            "share of matrix rate": flops / rate / ms["ours train"] * 1000, "matrix GFLOP/s": rate / 1e9}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unet", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, two rounds; the figures are not kept")
    options = parser.parse_args()
    names, rounds = (list(NETWORKS)[2:3], 2) if options.quick else (list(NETWORKS), 9)
    kinds = [(name, compiled) for name in names for compiled in ([False, True] if DEVICE == "cuda" and not options.quick else [False])]
    with tqdm(total=len(kinds) * (rounds + 1), unit="round") as bar:
        rows = [measure(name, rounds, compiled, bar) for name, compiled in kinds]
    claims = {"train_speedup": rows[0]["train speedup"], "sample_speedup": rows[0]["sample speedup"],
              "share_of_matrix_rate": rows[0]["share of matrix rate"]}
    finish("unet", claims, rows, options.quick)


if __name__ == "__main__":
    main()
