"""Time for an animated dish, and prompt accuracy of what the camera uncovers.

    python -m benchmarks.animate [--quick]

First table: seconds and network calls for 24 frames, at 64×64 pixels and, with the network of the
demo, at 128×128. "Inpainted once" is this project's method, in which the frames are cut
from one inpainted canvas. "RePaint at every frame" is the method of the project's first version
(2023).

Second table: the camera moves from held-out dishes to the right. An attribute classifier classifies
the view when the camera has moved half the width, and at the end of the move. The view then shows
two halves of dishes; therefore this classifier was trained on such views: windows over two drawn
dishes of the same name, side by side. It must classify 98 of 100 new windows exactly.
"""

import random
import time
from pathlib import Path

import numpy as np
import torch

from datasets.dishes import dish_names, draw_dish
from easy_diffusion import dish_classifier, generate, presets
from easy_diffusion.animation.camera import uncover
from easy_diffusion.animation.film import animate, default_pixels
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier
from easy_diffusion.inpainting.blending import blend, to_pixel_values
from easy_diffusion.inpainting.repaint import repaint_sampling
from easy_diffusion.pretrained import load_model

from .fidelity import MIN_CLASSIFIER_ACCURACY, classify_dishes
from .report import finish, make_parser

FRAMES = 24
SIZE = 64
CAMERA_STEP = default_pixels("right", (SIZE, SIZE))         # pixels
INPAINTED_ONCE = "inpainted once"
REPAINT_EVERY_FRAME = "RePaint at every frame"


# ------------------------------------------------------------------ the classifier of views


class CameraViews(torch.utils.data.Dataset):
    """Views of a camera that moves from one drawn dish to another of the same name.

    An item is (uint8 [3, 64, 64], name). offset: pixels by which the camera has moved, 0 to
    CAMERA_STEP; None: random.
    """

    def __init__(self, length: int, seed: int, names: list[str], offset: int | None = None):
        self.length = length
        self.seed = seed
        self.names = names
        self.offset = offset

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        seed = self.seed * 1_000_003 + index
        rng = random.Random(seed)
        name = rng.choice(self.names)
        first = draw_dish(name, SIZE, seed)
        second = draw_dish(name, SIZE, seed + 500_000)
        canvas = np.concatenate([first, second[..., SIZE - CAMERA_STEP:]], axis=2)
        offset = rng.randint(0, CAMERA_STEP) if self.offset is None else self.offset
        return torch.from_numpy(canvas[..., offset:offset + SIZE].copy()), name


def load_or_train_view_classifier(out: Path, count: int, steps: int) -> AttributeClassifier:
    """Load the classifier of camera views from `out`, or train it on `count` views of all names."""
    def draw_views():
        names = dish_names("train") + dish_names("held_out")
        return dish_classifier.load_whole_dataset(CameraViews(count, 300, names))

    path = out / f"view_classifier_{steps}.safetensors"
    return dish_classifier.cached_classifier(path, steps, draw_views)


# ------------------------------------------------------------------ what is measured


def inpaint_to_the_right(
    model: tuple, dishes: np.ndarray, names: list[str], pixels: int, steps: int
) -> np.ndarray:
    """Extend dishes uint8 [B, 64, 64, 3] by inpainting to [B, 64, 64 + pixels, 3].

    model: (network, encoder, diffusion). steps: noise levels of RePaint; the demo uses 25.
    The settings are those of the demo, but all dishes are inpainted in one batch.
    """
    network, encoder, diffusion = model
    device = next(network.parameters()).device
    uncovered = [uncover(dish, "right", pixels) for dish in dishes]
    images = [image for image, _ in uncovered]
    mask = uncovered[0][1]                                                      # [H, W]
    x0 = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()         # [B, 3, H, W]
    x0 = x0.to(device) / 127.5 - 1
    denoise = generate.guided_denoiser(network, encoder, diffusion, names, 2.0)
    *_, last = repaint_sampling(
        denoise,
        diffusion.schedule,
        x0,
        torch.from_numpy(mask)[None, None].to(device),
        steps,
        **presets.REPAINT,
        generator=torch.Generator().manual_seed(1),
    )
    inpainted = [
        blend(to_pixel_values(prediction), image, mask)
        for prediction, image in zip(last.x0[:, None], images)
    ]
    return np.concatenate([dishes, np.stack(inpainted)[:, :, -pixels:]], axis=2)


def time_film(model: tuple, autoencoder, size: int, move: str, method: str) -> dict:
    """Return a row with the seconds and the network calls of one film, from a name to its frames.

    model: (network, encoder, diffusion). method: INPAINTED_ONCE or REPAINT_EVERY_FRAME.
    """
    network = model[0]
    calls = 0

    def count_call(*_):
        nonlocal calls
        calls += 1

    hook = network.register_forward_hook(count_call)
    start = time.perf_counter()
    name = "番茄炒鸡蛋"
    dish = generate.generate_images(*model, [name], size, autoencoder=autoencoder)[0]
    inpaint = generate.make_model_inpainter(*model, autoencoder, name)
    if method == REPAINT_EVERY_FRAME:
        film = [dish]
        while len(film) < FRAMES:
            film.append(inpaint(*uncover(film[-1], move, max(1, size // FRAMES))))
    else:
        inpaint_around = generate.make_model_inpainter(*model, autoencoder, "", guidance=1.0)
        seconds = 2.4
        film = animate(
            dish,
            move,
            inpaint,
            inpaint_around=inpaint_around,
            seconds=seconds,
            fps=round(FRAMES / seconds),
        )
    duration = time.perf_counter() - start
    hook.remove()
    assert len(film) == FRAMES
    return {"side": size, "move": move, "method": method, "calls": calls, "seconds": duration}


def measure_times(models: list[tuple], quick: bool) -> list[dict]:
    """Return the rows of the first table. models: see `load_models`."""
    moves = ("right",) if quick else ("right", "circle", "centre", "down-right")
    films = [(move, INPAINTED_ONCE) for move in moves] + [("right", REPAINT_EVERY_FRAME)]
    rows = []
    for size, model, autoencoder in models:
        # Warm-up: the first call of a network is slower.
        generate.generate_images(*model, ["番茄炒鸡蛋"], size, steps=2, autoencoder=autoencoder)
        for move, method in films:
            rows.append(time_film(model, autoencoder, size, move, method))
            print(rows[-1], flush=True)
    return rows


def measure_view_classifier(classifier: AttributeClassifier, quick: bool) -> dict[int, float]:
    """Return {camera offset in pixels: accuracy on drawn held-out views}.

    Exits if an accuracy is too low, unless the run is quick.
    """
    count = 50 if quick else 500
    accuracies = {}
    for offset in (0, 32, CAMERA_STEP):
        dataset = CameraViews(500, 301, dish_names("held_out"), offset)
        images, names = zip(*[dataset[i] for i in range(count)])
        accuracies[offset] = classify_dishes(classifier, torch.stack(images), names)
    text = {offset: f"{accuracy:.1%}" for offset, accuracy in accuracies.items()}
    print("accuracy of the classifier on drawn held-out views:", text, flush=True)
    if min(accuracies.values()) < MIN_CLASSIFIER_ACCURACY and not quick:
        raise SystemExit(
            f"an accuracy below {MIN_CLASSIFIER_ACCURACY:.0%} is too low to measure samples with"
        )
    return accuracies


def measure_views(model: tuple, classifier, drawn_accuracies: dict, count: int) -> list[dict]:
    """Return the rows of the second table, measured on `count` generated held-out dishes."""
    names = random.Random(0).sample(dish_names("held_out"), count)
    dishes = generate.generate_images(*model, names, SIZE, seed=0)
    rows = []
    # (inpainted width, noise levels, camera offsets)
    for pixels, steps, offsets in (
        (CAMERA_STEP, 25, (0, 32, CAMERA_STEP)),
        (32, 25, (32,)),
        (CAMERA_STEP, 50, (32, CAMERA_STEP)),
    ):
        canvases = []
        for start in range(0, count, 50):
            batch = slice(start, start + 50)
            canvases.append(inpaint_to_the_right(model, dishes[batch], names[batch], pixels, steps))
        canvas = np.concatenate(canvases)                           # [N, 64, 64 + pixels, 3]
        for offset in offsets:
            view = torch.from_numpy(canvas[:, :, offset:offset + SIZE].copy())
            view = view.permute(0, 3, 1, 2)                         # [N, 3, 64, 64]
            rows.append({
                "inpainted width (of 64 pixels)": pixels,
                "steps": steps,
                "camera offset (pixels)": offset,
                "accuracy on drawn frames": drawn_accuracies[offset],
                "accuracy on inpainted frames": classify_dishes(classifier, view, names),
            })
            print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------ the command


def main():
    options = make_parser("animate", __doc__, out=Path("out")).parse_args()
    quick = options.quick
    out = options.out / "quick" if quick else options.out
    models = []
    for size in [SIZE] if quick else [SIZE, 128]:
        *model, autoencoder = load_model(size=size)
        models.append((size, model, autoencoder))
    rows = measure_times(models, quick)
    right = [row for row in rows if row["move"] == "right"]
    once = [row for row in right if row["method"] == INPAINTED_ONCE][-1]
    every_frame = [row for row in right if row["method"] == REPAINT_EVERY_FRAME][-1]

    view_count, classifier_steps = (500, 20) if quick else (30_000, 2800)
    classifier = load_or_train_view_classifier(out, view_count, classifier_steps)
    drawn_accuracies = measure_view_classifier(classifier, quick)
    _, model, _ = models[0]
    views = measure_views(model, classifier, drawn_accuracies, 8 if quick else 300)

    accuracies = [row["accuracy on inpainted frames"] for row in views]
    claims = {
        f"seconds_24_frames_{once['side']}": once["seconds"],
        "fewer_calls": every_frame["calls"] / once["calls"],
        "half_way_fidelity": accuracies[1],
        "far_fidelity": accuracies[2],
        "half_a_width_alone_fidelity": accuracies[3],
        "half_way_fidelity_50_steps": accuracies[4],
    }
    finish("animate", claims, rows, quick, views=views)


if __name__ == "__main__":
    main()
