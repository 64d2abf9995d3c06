"""From text to a looping film: is it the dish, does it move as asked, does it loop?

    python -m benchmarks.video [--quick]

The model of this repository for 64 pixels is trained on films of drawn dishes with the presets of
`python -m easy_diffusion.train_motion`. Then it generates films of held-out dishes, and of held-out
pairs of a way of cooking and a motion. They are judged by

    dish        the attribute classifier: does it find in every frame what the name says?
    motion      a classifier of motions, which must name 98% of new drawn films right
    rotation    of films of a turning plate: the fraction of neighbouring frames whose angle is
                within 5 degrees of the right one, by polar correlation
    loop        the change from the last frame to the first one over that between neighbours

The rows are variants of the training, each for the same time: as the presets have it; with
sinusoidal in place of circular positions; with the image network frozen; with motion modules that
begin with random last layers; and with half of the noise in common to all frames. "drawn films" is
what the metrics give for true films.

The table "flicker" is about latents. Drawn films of 128 pixels are encoded and decoded by the
autoencoder of this repository, each frame alone or all as one batch. Flicker is the std over the
frames, in grey levels of 255, of the pixels that stand still in the drawn film.
"""

import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from datasets.dish_films import (
    FRAMES,
    MOTIONS,
    SPLITS,
    DishFilms,
    draw_film,
    film_names,
    split_film_name,
)
from datasets.dishes import attributes
from easy_diffusion import train_motion
from easy_diffusion.diffusion.shared_noise import SharedNoiseDiffusion
from easy_diffusion.evaluation.film_metrics import (
    MotionClassifier,
    loop_seam_ratio,
    measure_rotation,
    train_motion_classifier,
)
from easy_diffusion.film_presets import BATCH, generate_films, inflate_model
from easy_diffusion.latent_space import decode_to_uint8, make_encoder
from easy_diffusion.networks.motion import MotionModule
from easy_diffusion.networks.weights_io import load_weights
from easy_diffusion.presets import prepare_dishes
from easy_diffusion.pretrained import WEIGHTS, load_model
from easy_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from easy_diffusion.training.distributed import default_device

from .fidelity import load_checked_classifier
from .report import finish, make_parser

SIZE = 64
LATENT_SIZE = 128
MIN_MOTION_ACCURACY = 0.98
TOLERANCE = 5                           # degrees
VARIANTS = (
    "circular positions", "sinusoidal positions", "image network frozen", "random last layers",
    "half of the noise shared",
)


# ------------------------------------------------------------------ what measures


class LabelledFilms(torch.utils.data.Dataset):
    """Item i is (film uint8 [F, 3, SIZE, SIZE], motion), of new films of a split."""

    def __init__(self, length: int, split: str, seed: int):
        self.films = DishFilms(length, SIZE, split, seed)

    def __len__(self):
        return len(self.films)

    def __getitem__(self, index):
        frames, name = self.films[index]
        return frames, split_film_name(name)[0]


def load_or_train_motion_classifier(out: Path, count: int, steps: int) -> MotionClassifier:
    """Load the motion classifier from `out`, or train it on films of all splits."""
    torch.manual_seed(0)
    classifier = MotionClassifier(MOTIONS).to(default_device())
    path = out / f"motion_classifier_{count}_{steps}.safetensors"
    if path.exists():
        load_weights(classifier, load_checkpoint(path))
    else:
        films = [LabelledFilms(count // 3, split, 300 + i) for i, split in enumerate(SPLITS)]
        loader = torch.utils.data.DataLoader(
            torch.utils.data.ConcatDataset(films), 8, shuffle=True, drop_last=True
        )
        losses = train_motion_classifier(classifier, loader, steps)
        for _ in tqdm(losses, total=steps, desc="motion classifier"):
            pass
        save_checkpoint(path, classifier.state_dict())
    return classifier


def measure(films, names: list[str], classifier, motions: MotionClassifier) -> dict:
    """Measure films uint8 [B, F, 3, H, W] with these names."""
    asked = [split_film_name(name) for name in names]
    is_dish = torch.ones(len(films), dtype=torch.bool)
    for frame in films.unbind(1):
        dishes = [attributes(dish) for _, dish in asked]
        is_dish &= torch.tensor(classifier.exact_matches(frame, dishes))
    found = motions.classify(films)
    turning = [film for film, (motion, _) in zip(films, asked) if motion == "turn"]
    moving = torch.stack([film for film, (motion, _) in zip(films, asked) if motion != "still"])
    row = {
        "dish right in every frame": float(is_dish.float().mean()),
        "motion": sum(a == b for a, (b, _) in zip(found, asked)) / len(names),
        "loop": float(loop_seam_ratio(moving).nanmean()),
    }
    angles = torch.stack([measure_rotation(film) for film in turning]).float()
    errors = (angles - 360 / films.shape[1] + 180) % 360 - 180
    return row | {"rotation": float((errors.abs() <= TOLERANCE).float().mean())}


def choose_names(split: str, count: int) -> list[str]:
    """Names of films of a split, as many of each motion."""
    rng = random.Random(0)
    by_motion = {motion: [] for motion in MOTIONS}
    for name in film_names(split):
        by_motion[split_film_name(name)[0]].append(name)
    lists = [names for names in by_motion.values() if names]
    return [rng.choice(lists[i % len(lists)]) for i in range(count)]


def make_variant(variant: str):
    """The model of this repository with new motion modules, as one of VARIANTS has it."""
    torch.manual_seed(0)
    positions = "sinusoidal" if variant == "sinusoidal positions" else "circular"
    model = inflate_model(load_model(WEIGHTS, SIZE), positions=positions)
    if variant == "random last layers":
        for module in model.network.modules():
            if isinstance(module, MotionModule):
                module.proj_out.reset_parameters()
    if variant == "half of the noise shared":
        known = model.diffusion
        shared = SharedNoiseDiffusion(
            0.5, known.schedule, known.prediction_type, known.variance, known.loss_weight
        )
        model = model._replace(diffusion=shared)
    return model


def generate(model, names: list[str], steps: int) -> tuple[torch.Tensor, float]:
    """Generate a film for each name: (uint8 [B, F, 3, H, W], seconds for one)."""
    films = []
    start = time.perf_counter()
    for i in tqdm(range(0, len(names), BATCH), desc="generating films", unit="batch"):
        batch = generate_films(model, names[i:i + BATCH], size=SIZE, steps=steps, seed=i)
        films.append(torch.from_numpy(batch).permute(0, 1, 4, 2, 3))
    return torch.cat(films), (time.perf_counter() - start) / len(names)


def measure_flicker(count: int) -> list[dict]:
    """The flicker of `count` films of moving dishes after the autoencoder, a row for each way."""
    autoencoder = load_model(WEIGHTS, LATENT_SIZE).autoencoder
    encode = make_encoder(autoencoder)
    flicker = {"each frame alone": [], "one batch": []}
    names = choose_names("held_out", 5 * count)
    for i, name in enumerate(tqdm(names, desc="flicker", unit="film")):
        if split_film_name(name)[0] not in ("turn", "toss", "sway"):
            continue
        film = torch.from_numpy(draw_film(name, LATENT_SIZE, 9000 + i).frames)
        stands_still = film.float().std(dim=0) == 0                     # [3, H, W]
        latents, _ = encode(film)
        decoded = {
            "each frame alone": np.concatenate(
                [decode_to_uint8(autoencoder, latent) for latent in latents.split(1)]
            ),
            "one batch": decode_to_uint8(autoencoder, latents),
        }
        for way, frames in decoded.items():
            frames = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
            flicker[way].append(float(frames.std(dim=0)[stands_still].mean()))
    return [
        {"decoded": way, "flicker": sum(values) / len(values)} for way, values in flicker.items()
    ]


# ------------------------------------------------------------------ the command


def main():
    options = make_parser(
        "video", __doc__, out=Path("out/video"), minutes=4.0 if torch.cuda.is_available() else 12.0
    ).parse_args()
    quick = options.quick
    out = options.out / "quick" if quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    count, steps = (5, 2) if quick else (100, 25)

    # What measures
    classifier, _ = load_checked_classifier(SIZE, out, quick, 4 * count)
    motions = load_or_train_motion_classifier(out, *((30, 5) if quick else (3000, 600)))
    names = choose_names("held_out", count)
    drawn = [torch.from_numpy(draw_film(name, SIZE, 9000 + i).frames)
             for i, name in enumerate(names)]
    row = {"films": "drawn films"} | measure(torch.stack(drawn), names, classifier, motions)
    rows = [row | {"held-out motion": "", "seconds": ""}]
    print(rows[0], flush=True)
    if rows[0]["motion"] < MIN_MOTION_ACCURACY and not quick:
        raise SystemExit(f"below {MIN_MOTION_ACCURACY:.0%} the classifier cannot measure motions")

    # Variants of the training
    pairs = choose_names("held_out_motion", count)
    films = prepare_dishes(out / f"films_{SIZE}", 16 if quick else 3000, SIZE, DishFilms)
    for variant in VARIANTS:
        model = make_variant(variant)
        train_motion.train_on_films(
            model, films, 0.05 if quick else options.minutes, 2 if quick else BATCH,
            out / f"{variant.replace(' ', '_')}.safetensors", variant == "image network frozen",
        )
        samples, seconds = generate(model, names, steps)
        row = {"films": variant} | measure(samples, names, classifier, motions)
        samples, _ = generate(model, pairs, steps)
        row["held-out motion"] = measure(samples, pairs, classifier, motions)["motion"]
        rows.append(row | {"seconds": seconds})
        print(rows[-1], flush=True)

    ours = rows[1]
    claims = {
        "dish_right_every_frame": ours["dish right in every frame"],
        "motion_accuracy": ours["motion"],
        "held_out_motion_accuracy": ours["held-out motion"],
        "rotation_within_5_degrees": ours["rotation"],
        "loop_seam_ratio": ours["loop"],
        "sinusoidal_loop_seam_ratio": rows[2]["loop"],
        f"seconds_{FRAMES}_frames": ours["seconds"],
    }
    finish("video", claims, rows, quick, flicker=measure_flicker(2 if quick else 10))


if __name__ == "__main__":
    main()
