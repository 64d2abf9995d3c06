"""Quality and cost of the samplers: python -m benchmarks.samplers [--quick]

First table: the demo's network generates the same dishes with each sampler at several numbers of
steps. Measured are the prompt accuracy (fidelity), and the kernel and Fréchet distances of the
attribute classifier's features to those of drawn dishes.

Second comparison, with diffusers' schedulers on the same network: the largest difference between
the images, and the time of a step without the network.

The network is that of weights/ for images of 64×64.
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

from datasets.dishes import dish_names, draw_dish
from easy_diffusion import dish_classifier, generate, presets
from easy_diffusion.diffusion.samplers import ddim, ddpm, dpm_solver, heun
from easy_diffusion.evaluation.attribute_classifier import classifier_features
from easy_diffusion.evaluation.metrics import frechet_distance, kernel_distance
from easy_diffusion.images import to_uint8
from easy_diffusion.pretrained import load_model

from .fidelity import classify_dishes
from .report import finish, make_parser

SAMPLERS = {
    "DDPM": ddpm,
    "DDIM": ddim,
    "DPM-Solver++": dpm_solver,
    "DPM-Solver++ SDE": partial(dpm_solver, stochastic=True),
    "Heun": heun,
}
RUNS = [        # (sampler, steps)
    ("DDPM", 250), ("DDPM", 50),
    ("DDIM", 50), ("DDIM", 25), ("DDIM", 10),
    ("DPM-Solver++", 20), ("DPM-Solver++", 12), ("DPM-Solver++", 6),
    ("DPM-Solver++ SDE", 20),
    ("Heun", 13), ("Heun", 6),
]


# ------------------------------------------------------------------ quality


def sample_images(
    model: tuple, names: list[str], sampler: str, steps: int, size: int, progress_bar
) -> tuple[torch.Tensor, float]:
    """Generate an image of each name: (uint8 [N, 3, size, size], seconds).

    model: (network, encoder, diffusion). The images are generated a hundred at a time.
    """
    network, encoder, diffusion = model
    images = []
    start = time.perf_counter()
    for first in range(0, len(names), 100):
        batch_names = names[first:first + 100]
        denoise = generate.guided_denoiser(network, encoder, diffusion, batch_names, guidance=2.0)
        sampling = SAMPLERS[sampler](
            denoise,
            diffusion.schedule,
            (len(batch_names), 3, size, size),
            steps=steps,
            generator=torch.Generator().manual_seed(first),
            device=next(network.parameters()).device,
        )
        for step in sampling:
            progress_bar.update(len(batch_names))
        images.append(torch.from_numpy(to_uint8(step.x)).permute(0, 3, 1, 2))
    return torch.cat(images), time.perf_counter() - start


def measure_sampler(
    model, classifier, names, drawn_features, sampler: str, steps: int, size: int, progress_bar
) -> dict:
    """Return a row of the first table. drawn_features: of drawn dishes of the same names."""
    images, seconds = sample_images(model, names, sampler, steps, size, progress_bar)
    features = classifier_features(classifier, images)
    distance, standard_error = kernel_distance(features, drawn_features)
    evaluations = 2 * steps - 1 if sampler == "Heun" else steps
    return {
        "sampler": sampler,
        "steps": steps,
        "network_calls": 2 * evaluations,       # guidance needs two per evaluation
        "fidelity": classify_dishes(classifier, images, names),
        "kernel_distance": distance,
        "standard_error": standard_error,
        "frechet_distance": frechet_distance(features, drawn_features),
        "seconds": seconds,
    }


# ------------------------------------------------------------------ comparison with diffusers


def make_peers(schedule) -> dict:
    """Return {name: (our sampler, diffusers' scheduler with the same noise schedule)}."""
    options = dict(
        trained_betas=schedule.betas.numpy(),
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    return {
        "DDIM": (ddim, DDIMScheduler(**options, clip_sample=False)),
        "DPM-Solver++": (dpm_solver, DPMSolverMultistepScheduler(**options)),
    }


def sample_with_diffusers(scheduler, predict_x0, x: torch.Tensor, steps: int) -> torch.Tensor:
    """Run the sampling loop of diffusers from x_T to x_0. predict_x0: (x_t, t) → x0."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(predict_x0(x, t.expand(len(x))), t, x).prev_sample
    return x


def compare_with_diffusers(model: tuple, size: int, quick: bool) -> list[dict]:
    """Return rows with the largest difference of the images, and the milliseconds of a step.

    The time is that of a step without the network, for which a constant is returned.
    """
    network, encoder, diffusion = model
    schedule = diffusion.schedule
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(8, 3, size, size, generator=generator).to(device)
    context, mask = encoder(random.Random(1).sample(dish_names("held_out"), 8))
    large_x_T = torch.randn(32, 3, size, size, device=device)
    constant = torch.zeros_like(large_x_T)

    def call_network(x, t):
        return network(x, t, context, mask)

    def return_constant(*_):
        return constant

    rows = []
    for name, (sampler, scheduler) in make_peers(schedule).items():
        with torch.no_grad():
            denoise = diffusion.denoiser(network, context, mask)
            *_, last = sampler(denoise, schedule, steps=20, x_T=x_T)
            peer_images = sample_with_diffusers(scheduler, call_network, x_T, 20)

        # Both take turns, so that both are affected equally by other work of the machine.
        our_seconds = []
        peer_seconds = []
        for _ in range(3 if quick else 15):
            start = time.perf_counter()
            denoise = diffusion.denoiser(return_constant)
            for _ in sampler(denoise, schedule, steps=25, x_T=large_x_T):
                pass
            our_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            sample_with_diffusers(scheduler, return_constant, large_x_T, 25)
            peer_seconds.append(time.perf_counter() - start)
        our_step = statistics.median(our_seconds) / 25
        peer_step = statistics.median(peer_seconds) / 25
        rows.append({
            "sampler": f"{name}, 20 steps",
            "largest_difference": float((last.x - peer_images).abs().max()),
            "ms_a_step": 1000 * our_step,
            "ms_a_step_diffusers": 1000 * peer_step,
            "ratio": our_step / peer_step,
        })
    return rows


# ------------------------------------------------------------------ the command


def parse_options() -> argparse.Namespace:
    parser = make_parser("samplers", __doc__, out=Path("out"))
    parser.add_argument(
        "--images", type=int, default=200, help="number of images that each sampler generates"
    )
    parser.add_argument(
        "--size", type=int, default=presets.SIZE, help="height and width of the images in pixels"
    )
    return parser.parse_args()


def compute_claims(rows: list[dict], comparison: list[dict], count: int, quick: bool) -> dict:
    """Return the claims; the gaps are to DDPM with 250 steps, which a quick run does not have."""
    claims = {
        "overhead_ratio": max(row["ratio"] for row in comparison),
        "images": count,
        "largest_difference_to_diffusers": max(row["largest_difference"] for row in comparison),
    }
    if quick:
        return claims
    by_run = {(row["sampler"], row["steps"]): row for row in rows}
    reference = by_run["DDPM", 250]
    for claim, run in (
        ("dpm_solver_12", by_run["DPM-Solver++", 12]),
        ("ddim_25", by_run["DDIM", 25]),
    ):
        kernel_gap = run["kernel_distance"] - reference["kernel_distance"]
        claims[f"{claim}_gap"] = 100 * (reference["fidelity"] - run["fidelity"])    # points
        claims[f"{claim}_kernel_gap"] = kernel_gap
        claims[f"{claim}_kernel_gap_in_standard_errors"] = (
            kernel_gap / reference["standard_error"]
        )
    return claims


def main():
    options = parse_options()
    quick = options.quick
    size = options.size
    count = 20 if quick else options.images
    model = load_model(size=size)[:3]
    if quick:
        classifier = dish_classifier.load_or_train_classifier(size, 40, options.out, 1000)
    else:
        classifier = dish_classifier.load_or_train_classifier(size, 2600, options.out)

    names = random.Random(0).sample(dish_names("train"), count)
    drawn = [
        torch.from_numpy(draw_dish(name, size, seed)) for seed, name in enumerate(names, 10**6)
    ]
    drawn_features = classifier_features(classifier, torch.stack(drawn))
    runs = [(sampler, min(steps, 3)) for sampler, steps in RUNS] if quick else RUNS
    rows = []
    total = count * sum(steps for _, steps in runs)
    with tqdm(total=total, desc="sampling", unit="image·step") as progress_bar:
        for sampler, steps in runs:
            progress_bar.set_postfix_str(f"{sampler}, {steps} steps")
            row = measure_sampler(
                model, classifier, names, drawn_features, sampler, steps, size, progress_bar
            )
            rows.append(row)
            tqdm.write(str(row))

    comparison = compare_with_diffusers(model, size, quick)
    for row in comparison:
        print(row)
    claims = compute_claims(rows, comparison, count, quick)
    finish("samplers", claims, rows, quick)


if __name__ == "__main__":
    main()
