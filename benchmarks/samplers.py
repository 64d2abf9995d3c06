"""What more steps buy: python -m benchmarks.samplers [--quick]

The demo's network draws the same dishes with each sampler at several numbers of steps; the reader tells how many are right,
and the kernel and Fréchet distances how far the set is from real drawings. Beside it, on the same network, diffusers' samplers:
whether the pictures are equal, and what a step costs apart from the network. Needs the demo's finished training
(python -m easy_diffusion.demo), and makes it where it is missing.
"""

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tqdm.auto import tqdm

from datasets.dishes import attributes, dish_names
from datasets.dishes import draw_dish as drawn
from easy_diffusion import generate, presets
from easy_diffusion.diffusion.samplers import ddim, ddpm, dpm_solver, heun
from easy_diffusion.evaluation.attribute_classifier import classifier_features, prompt_accuracy
from easy_diffusion.evaluation.metrics import frechet_distance, kernel_distance
from easy_diffusion.images import to_uint8

from .fidelity import trained_reader
from .report import finish

SAMPLERS = {"DDPM": ddpm, "DDIM": ddim, "DPM-Solver++": dpm_solver,
            "DPM-Solver++ SDE": partial(dpm_solver, stochastic=True), "Heun": heun}
RUNS = [("DDPM", 250), ("DDPM", 50), ("DDIM", 50), ("DDIM", 25), ("DDIM", 10), ("DPM-Solver++", 20), ("DPM-Solver++", 12),
        ("DPM-Solver++", 6), ("DPM-Solver++ SDE", 20), ("Heun", 13), ("Heun", 6)]


def draw(model, names, sampler, steps, size, bar):
    """Pictures uint8 [N, 3, size, size] of the names, a hundred at a time, and the seconds it took."""
    network, encoder, diffusion = model
    parts, start = [], time.perf_counter()
    for first in range(0, len(names), 100):
        some = names[first:first + 100]
        denoise = generate.guided_denoiser(network, encoder, diffusion, some, guidance=2.0)
        walk = SAMPLERS[sampler](denoise, diffusion.schedule, (len(some), 3, size, size), steps=steps,
                                 generator=torch.Generator().manual_seed(first), device=next(network.parameters()).device)
        for step in walk:
            bar.update(len(some))
        parts.append(torch.from_numpy(to_uint8(step.x)).permute(0, 3, 1, 2))
    return torch.cat(parts), time.perf_counter() - start


def peers(schedule):
    """name: (our sampler, diffusers' scheduler of the same schedule)."""
    options = dict(trained_betas=schedule.betas.numpy(), prediction_type="sample", timestep_spacing="trailing")
    return {"DDIM": (ddim, DDIMScheduler(**options, clip_sample=False)),
            "DPM-Solver++": (dpm_solver, DPMSolverMultistepScheduler(**options))}


def theirs(scheduler, output, x, steps):
    """diffusers' way: x_T → picture; output(x_t, t) is the network's."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, t.expand(len(x))), t, x).prev_sample
    return x


def beside_diffusers(model, size, quick):
    """Rows: the largest difference of the pictures, and the milliseconds of a step without the network, ours and theirs."""
    network, encoder, diffusion = model
    device = next(network.parameters()).device
    x_T = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    words = encoder(random.Random(1).sample(dish_names("held_out"), 8))
    large = torch.randn(32, 3, size, size, device=device)
    answer = torch.zeros_like(large)
    rows = []
    for name, (sampler, scheduler) in peers(diffusion.schedule).items():
        with torch.no_grad():
            *_, last = sampler(diffusion.denoiser(network, *words), diffusion.schedule, steps=20, x_T=x_T)
            peer = theirs(scheduler, lambda x, t: network(x, t, *words), x_T, 20)
        seconds = {"ours": [], "diffusers": []}
        for _ in range(3 if quick else 15):                                 # in turn, so that both see the same machine
            start = time.perf_counter()
            for _ in sampler(diffusion.denoiser(lambda *_: answer), diffusion.schedule, steps=25, x_T=large):
                pass
            seconds["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            theirs(scheduler, lambda x, t: answer, large, 25)
            seconds["diffusers"].append(time.perf_counter() - start)
        ours, peer_seconds = (statistics.median(seconds[who]) / 25 for who in ("ours", "diffusers"))
        rows.append({"sampler": f"{name}, 20 steps", "largest_difference": float((last.x - peer).abs().max()),
                     "ms_a_step": 1000 * ours, "ms_a_step_diffusers": 1000 * peer_seconds, "ratio": ours / peer_seconds})
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few pictures and steps; the figures are not kept")
    parser.add_argument("--pictures", type=int, default=200, help="drawn by each sampler")
    parser.add_argument("--size", type=int, default=presets.SIZE, help="side of the pictures")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the demo's training and the reader are kept")
    options = parser.parse_args()
    size, count = options.size, (20 if options.quick else options.pictures)
    model = presets.build_networks("".join(dish_names("train")))
    trained = options.out / f"model_{size}.safetensors"
    if trained.exists() or not options.quick:
        store = presets.prepare_dishes(options.out / f"dishes_{size}", presets.DISHES, size)
        presets.train_or_load(*model, store, trained, 2.5 if torch.cuda.is_available() else 10.0)
    else:
        print("no training found: a quick run draws with a new network")
        torch.nn.ModuleList(model[:2]).eval()
    reader = trained_reader(size, 40, options.out, 1000) if options.quick else trained_reader(size, 2600, options.out)
    names = random.Random(0).sample(dish_names("train"), count)
    real = classifier_features(reader, torch.stack([torch.from_numpy(drawn(name, size, seed)) for seed, name in enumerate(names, 10 ** 6)]))
    runs = [(name, min(steps, 3)) for name, steps in RUNS] if options.quick else RUNS
    rows = []
    with tqdm(total=count * sum(steps for _, steps in runs), desc="sampling", unit="picture·step") as bar:
        for name, steps in runs:
            bar.set_postfix_str(f"{name}, {steps} steps")
            pictures, seconds = draw(model, names, name, steps, size, bar)
            features = classifier_features(reader, pictures)
            distance, error = kernel_distance(features, real)
            rows.append({"sampler": name, "steps": steps, "network_calls": 2 * (2 * steps - 1 if name == "Heun" else steps),
                         "fidelity": prompt_accuracy(reader.exact_matches(pictures, [attributes(dish) for dish in names])),
                         "kernel_distance": distance, "standard_error": error, "frechet_distance": frechet_distance(features, real),
                         "seconds": seconds})
            tqdm.write(str(rows[-1]))
    compared = beside_diffusers(model, size, options.quick)
    for row in compared:
        print(row)
    by_run = {(row["sampler"], row["steps"]): row for row in rows}
    claims = {"overhead_ratio": max(row["ratio"] for row in compared), "pictures": count,
              "largest_difference_to_diffusers": max(row["largest_difference"] for row in compared)}
    if not options.quick:
        long = by_run["DDPM", 250]
        for claim, run in (("dpm_solver_12", by_run["DPM-Solver++", 12]), ("ddim_25", by_run["DDIM", 25])):
            claims[f"{claim}_gap"] = 100 * (long["fidelity"] - run["fidelity"])                          # points
            claims[f"{claim}_kernel_gap"] = run["kernel_distance"] - long["kernel_distance"]
            claims[f"{claim}_kernel_gap_in_standard_errors"] = claims[f"{claim}_kernel_gap"] / long["standard_error"]
    finish("samplers", claims, rows, options.quick)


if __name__ == "__main__":
    main()
