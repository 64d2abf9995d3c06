"""Classification with a diffusion model, beside a discriminative network.

    python -m benchmarks.classification [--quick] [--photos FOLDER --photo-weights FOLDER]

The model of this repository for 64 pixels names drawn dishes; see
evaluation/diffusion_classifier.py. Its training images contain 171 of the 190 pairs of ingredients.

    pairs       the way of cooking is given; which of 190 pairs is it? Dishes of the 19 held-out
                pairs, as they are drawn and changed: blurred, with noise, half covered, recoloured,
                on a table that no training image has
    dishes      which of all 1,680 dishes is it? First the way, then the ingredients

The discriminative network is the attribute classifier, trained on the same training images. Of all
pairs it chooses the one with the largest sum of logits.

With --photos and --photo-weights the model that easy_diffusion.train_photos has trained on FOLDER
names the test photographs; the linear probe on ImageNet features is asked, too.
"""

import argparse
import random
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from datasets import dish_scene, dishes
from datasets.dishes import INGREDIENT_PAIRS, INGREDIENTS, WAYS, attributes, draw_dish
from easy_diffusion import dish_classifier, photo_presets
from easy_diffusion.evaluation.diffusion_classifier import classify, rank
from easy_diffusion.evaluation.photo_classifier import top_k_accuracy
from easy_diffusion.latent_space import make_encoder
from easy_diffusion.pretrained import WEIGHTS, load_model
from easy_diffusion.training.distributed import default_device

from .report import finish, make_parser

SIZE = 64
WAY_ROUNDS = ((1, 8), (4, 1))                   # of the first stage, see name_dish
PHOTO_ROUNDS = ((8, 10), (24, 5), (96, 1))
PUBLISHED_CHINESE_CLIP = 0.7875                 # zero-shot, 20 dishes, 400 other photographs


# ------------------------------------------------------------------ changed dishes


def blur(x):
    small = F.avg_pool2d(x[None], 4)
    return F.interpolate(small, scale_factor=4, mode="bilinear")[0]


def add_noise(x):
    return x + 40 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def cover_half(x):
    x = x.clone()
    x[:, :, SIZE // 2:] = 127
    return x


def recolour(x):
    """Channels mixed, as under coloured light."""
    mixing = torch.tensor([[0.8, 0.0, 0.2], [0.2, 0.7, 0.1], [0.0, 0.3, 0.9]])
    return torch.einsum("ij,jhw->ihw", mixing, x) * 0.8


CHANGES = {
    "as drawn": lambda x: x,
    "blurred": blur,
    "noise": add_noise,
    "half covered": cover_half,
    "recoloured": recolour,
    "unknown table": lambda x: x,               # drawn by draw_on_checks
}


def draw_on_checks(name: str, size: int, seed: int) -> np.ndarray:
    """Draw a dish on a blue and white chequered table."""
    def render_checks(index, pixels):
        y, x = np.indices((pixels, pixels)) * 8 // pixels
        is_blue = (x + y) % 2
        canvas = np.zeros((5, pixels, pixels), np.float32)
        canvas[:3] = np.where(is_blue, np.array([[[0.15]], [[0.3]], [[0.75]]]), 0.95)
        return canvas

    with mock.patch.object(dish_scene, "render_tabletop", render_checks):
        return draw_dish(name, size, seed)


def draw_changed(name: str, seed: int, change: str) -> torch.Tensor:
    """Draw a dish and change it: uint8 [3, SIZE, SIZE]."""
    draw = draw_on_checks if change == "unknown table" else draw_dish
    x = CHANGES[change](torch.from_numpy(draw(name, SIZE, seed)).float())
    return x.round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------ the two classifiers


def pair_names(way: str) -> list[str]:
    """A name for each of the 190 pairs of ingredients."""
    return [WAYS[way].name_with_two.format(*pair) for pair in INGREDIENT_PAIRS]


def name_dish(model, x0) -> tuple[str, str]:
    """Find the way of cooking and the name among all dishes, in two stages: (way, name)."""
    singles = [
        (way, WAYS[way].name_with_one.format(ingredient))
        for way in WAYS for ingredient in INGREDIENTS
    ]
    rounds = list(classify(*model, x0, [name for _, name in singles], WAY_ROUNDS))
    way, _ = singles[rank(rounds)[0]]
    names = pair_names(way) + [name for its_way, name in singles if its_way == way]
    return way, names[rank(list(classify(*model, x0, names)))[0]]


def is_same_dish(a: str, b: str) -> bool:
    """Whether two names mean the same dish; a pair has a name for each order."""
    a, b = attributes(a), attributes(b)
    return a.way == b.way and set(a.ingredients) == set(b.ingredients)


@torch.no_grad()
def choose_pairs(classifier, images) -> list[frozenset]:
    """The pair of ingredients with the largest sum of logits for each image uint8 [N, 3, H, W]."""
    pairs = torch.tensor(
        [[classifier.ingredients.index(ingredient) for ingredient in pair]
         for pair in INGREDIENT_PAIRS]
    )
    logits = torch.cat([classifier.eval()(batch)[0].cpu() for batch in images.split(100)])
    best = logits[:, pairs].sum(dim=2).argmax(dim=1).tolist()                   # [N]
    return [frozenset(INGREDIENT_PAIRS[i]) for i in best]


# ------------------------------------------------------------------ what is measured


def measure_pairs(model, classifier, names: list[str], change: str) -> dict:
    """Return the row of one change: the accuracy of both classifiers on dishes with these names."""
    device = default_device()
    images = torch.stack([draw_changed(name, 1000 + i, change) for i, name in enumerate(names)])
    truth = [frozenset(attributes(name).ingredients) for name in names]
    correct = 0
    start = time.perf_counter()
    for image, name, pair in zip(tqdm(images, desc=change, unit="image"), names, truth):
        x0 = image.to(device) / 127.5 - 1
        best = rank(list(classify(*model, x0, pair_names(attributes(name).way))))[0]
        correct += frozenset(INGREDIENT_PAIRS[best]) == pair
    seconds = (time.perf_counter() - start) / len(names)
    chosen = choose_pairs(classifier, images.to(device))
    discriminative = sum(a == b for a, b in zip(chosen, truth))
    return {
        "question": f"pairs, {change}",
        "images": len(names),
        "candidates": len(INGREDIENT_PAIRS),
        "accuracy": correct / len(names),
        "discriminative": discriminative / len(names),
        "seconds per image": seconds,
    }


def measure_dishes(model, names: list[str]) -> tuple[dict, float]:
    """Return the row for all dishes, and the accuracy of the way of cooking."""
    right_way, correct = 0, 0
    start = time.perf_counter()
    for i, name in enumerate(tqdm(names, desc="all dishes", unit="image")):
        x0 = torch.from_numpy(draw_dish(name, SIZE, 5000 + i)).to(default_device()) / 127.5 - 1
        way, best = name_dish(model, x0)
        right_way += way == attributes(name).way
        correct += is_same_dish(name, best)
    row = {
        "question": "all dishes",
        "images": len(names),
        "candidates": len(WAYS) * (len(INGREDIENT_PAIRS) + len(INGREDIENTS)),
        "accuracy": correct / len(names),
        "discriminative": "",
        "seconds per image": (time.perf_counter() - start) / len(names),
    }
    return row, right_way / len(names)


def measure_photos(folder: Path, weights: Path, out: Path) -> tuple[dict, dict]:
    """Return the row of the test photographs, and its claims."""
    photographs = photo_presets.prepare_views(folder, out)
    metrics = photo_presets.prepare_metrics(photographs, out / "features.safetensors")
    network, encoder, diffusion, autoencoder = load_model(weights, photo_presets.SIZE)
    encode = make_encoder(autoencoder)
    is_known = [name in metrics.names for name in photographs.test_names]
    images = photographs.test_images[is_known]
    names = [name for name in photographs.test_names if name in metrics.names]
    logits = torch.zeros(len(images), len(metrics.names))
    start = time.perf_counter()
    for i, image in enumerate(tqdm(images, desc="photographs", unit="image")):
        x0 = encode(image[None])[0][0]
        rounds = classify(network, diffusion, encoder, x0, metrics.names, PHOTO_ROUNDS)
        order = rank(list(rounds))
        logits[i, order] = -torch.arange(len(order)).float()
    seconds = (time.perf_counter() - start) / len(images)
    labels = torch.tensor([metrics.names.index(name) for name in names])
    row = {
        "question": "photographs",
        "images": len(images),
        "candidates": len(metrics.names),
        "accuracy": top_k_accuracy(logits, labels, 1),
        "discriminative": metrics.accuracy(images, names),
        "seconds per image": seconds,
    }
    claims = {
        "photos_top1": row["accuracy"],
        "photos_top5": top_k_accuracy(logits, labels, 5),
        "probe_photos_top1": row["discriminative"],
        "probe_photos_top5": metrics.accuracy(images, names, 5),
        "published_chinese_clip_top1": PUBLISHED_CHINESE_CLIP,
    }
    return row, claims


# ------------------------------------------------------------------ the command


def parse_options() -> argparse.Namespace:
    parser = make_parser("classification", __doc__, out=Path("out"))
    parser.add_argument("--photos", type=Path, help="one subfolder of photographs per dish")
    parser.add_argument("--photo-weights", type=Path, help="OUT/weights of train_photos")
    parser.add_argument(
        "--photo-out", type=Path, default=Path("out/photos"), help="OUT of train_photos"
    )
    options = parser.parse_args()
    if (options.photos is None) != (options.photo_weights is None):
        parser.error("--photos and --photo-weights must be used together")
    return options


def train_discriminative(out: Path, quick: bool) -> tuple:
    """Train the attribute classifier on training dishes alone, or load it: (it, minutes)."""
    count, steps = (500, 20) if quick else (20_000, 2800)
    path = out / f"discriminative_{count}_{steps}.safetensors"
    start = time.perf_counter()
    classifier = dish_classifier.cached_classifier(
        path, steps, lambda: dish_classifier.draw_dishes(count, SIZE, "train", seed=0)
    )
    return classifier.to(default_device()), (time.perf_counter() - start) / 60


def main():
    options = parse_options()
    quick = options.quick
    options.out.mkdir(parents=True, exist_ok=True)
    network, encoder, diffusion, _ = load_model(WEIGHTS, SIZE)
    model = (network, diffusion, encoder)
    classifier, minutes = train_discriminative(options.out, quick)

    rng = random.Random(0)
    held_out = [
        name for name in dishes.dish_names("held_out") if len(attributes(name).ingredients) == 2
    ]
    rows = []
    for change in CHANGES:
        count = 2 if quick else 300 if change == "as drawn" else 60
        rows.append(measure_pairs(model, classifier, rng.choices(held_out, k=count), change))
        print(rows[-1], flush=True)
    names = dishes.dish_names("train") + dishes.dish_names("held_out")
    row, ways_accuracy = measure_dishes(model, rng.sample(names, 2 if quick else 100))
    changed = rows[1:]
    claims = {
        "unseen_pairs_accuracy": rows[0]["accuracy"],
        "discriminative_unseen_pairs_accuracy": rows[0]["discriminative"],
        "discriminative_minutes": minutes,
        "seconds_per_image": rows[0]["seconds per image"],
        "ways_accuracy": ways_accuracy,
        "full_name_accuracy": row["accuracy"],
        "corrupted_accuracy": sum(each["accuracy"] for each in changed) / len(changed),
        "discriminative_corrupted_accuracy":
            sum(each["discriminative"] for each in changed) / len(changed),
    }
    rows.append(row)
    if options.photos:
        row, photo_claims = measure_photos(
            options.photos, options.photo_weights, options.photo_out
        )
        rows.append(row)
        claims |= photo_claims
    finish("classification", claims, rows, quick)


if __name__ == "__main__":
    main()
