"""A ControlNet obeys a layout, and another one inpaints in six steps.

    python -m benchmarks.control [--quick]

First table: dishes of held-out names are sampled with the map of parts of a drawn dish as control.
A segmentation network, trained on drawn dishes, finds the parts in the samples; the mean IoU with
the wanted parts says how well the layout is kept, and the attribute classifier whether the caption
is. It must find 97% of the pixels of new drawn dishes. The rows are

    without control     the text-to-image model alone
    its own layout      layout and name of the same dish
    another layout      the layout of one dish and the name of another with the same way of cooking

In which of the two ingredients' places an ingredient lies is left to the model: the better of both
is counted. "both right" is the fraction of samples with a mean IoU of at least 0.7 and exactly the
ingredients and the way of cooking of the name.

Second table: the camera moves from dishes to the right, as in benchmarks/animate.py. The accuracy
half-way and at the end is that of the classifier of camera views there.
"""

import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from datasets.dish_controls import parts_control
from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import Dishes, attributes, compose, dish_names
from easy_diffusion import generate, presets, train_control
from easy_diffusion.animation.camera import uncover
from easy_diffusion.evaluation.part_segmenter import PartSegmenter, mean_iou, train_segmenter
from easy_diffusion.inpainting.control_inpainter import make_control_inpainter
from easy_diffusion.networks.controlnet import Control, Controlled, load_controlnet
from easy_diffusion.networks.weights_io import load_weights
from easy_diffusion.pretrained import WEIGHTS, load_model
from easy_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

from . import animate
from .fidelity import classify_dishes, load_checked_classifier
from .report import finish, make_parser

SIZE = 64
MIN_PIXEL_ACCURACY = 0.97
MIN_IOU = 0.7                   # of a sample that keeps to its layout
BATCH = 50                      # images that are sampled at once


# ------------------------------------------------------------------ the segmenter


class LabelledDishes(torch.utils.data.Dataset):
    """Item i is (image uint8 [3, SIZE, SIZE], class of each pixel int64 [SIZE, SIZE])."""

    def __init__(self, segmenter: PartSegmenter, length: int, split: str, seed: int):
        self.segmenter = segmenter
        self.dishes = Dishes(length, SIZE, split, seed)

    def __len__(self):
        return len(self.dishes)

    def __getitem__(self, index):
        name, seed = self.dishes.choose(index)
        dish = compose(name, SIZE, seed)
        labels = self.segmenter.labels(torch.from_numpy(dish.parts), attributes(name).ingredients)
        return torch.from_numpy(dish.image), labels


def load_or_train_segmenter(out: Path, count: int, steps: int) -> PartSegmenter:
    """Load the segmenter from `out`, or train it on dishes of both splits."""
    torch.manual_seed(0)
    segmenter = PartSegmenter(INGREDIENTS).to(presets.default_device())
    path = out / f"segmenter_{count}_{steps}.safetensors"
    if path.exists():
        load_weights(segmenter, load_checkpoint(path))
    else:
        parts = [
            LabelledDishes(segmenter, count * 9 // 10, "train", 200),
            LabelledDishes(segmenter, count - count * 9 // 10, "held_out", 201),
        ]
        loader = torch.utils.data.DataLoader(
            torch.utils.data.ConcatDataset(parts), 32, shuffle=True, drop_last=True
        )
        for _ in tqdm(train_segmenter(segmenter, loader, steps), total=steps, desc="segmenter"):
            pass
        save_checkpoint(path, segmenter.state_dict())
    return segmenter


def measure_segmenter(segmenter: PartSegmenter, count: int) -> float:
    """Return the fraction of pixels of new held-out dishes that are segmented right."""
    dataset = LabelledDishes(segmenter, count, "held_out", 202)
    images, labels = (torch.stack(parts) for parts in zip(*(dataset[i] for i in range(count))))
    return float((segmenter.segment(images) == labels).float().mean())


# ------------------------------------------------------------------ layouts


def draw_layouts(names: list[str]) -> torch.Tensor:
    """The maps of parts of drawn dishes of these names, uint8 [N, SIZE, SIZE]."""
    dishes = [compose(name, SIZE, 7000 + i) for i, name in enumerate(names)]
    return torch.from_numpy(np.stack([dish.parts for dish in dishes]))


def sample(model, controlnet, names: list[str], layouts: torch.Tensor | None) -> torch.Tensor:
    """Sample an image for each name, with a control if there are layouts: uint8 [N, 3, H, W]."""
    unet, encoder, diffusion, _ = model
    batches = []
    for start in tqdm(range(0, len(names), BATCH), desc="sampling", unit="batch"):
        network = unet
        if layouts is not None:
            control = torch.stack(
                [parts_control(parts, False) for parts in layouts[start:start + BATCH]]
            )
            control = control.to(unet.conv_in.weight.device) / 255
            network = Controlled(unet, [Control(controlnet, control)])
        images = generate.generate_images(
            network, encoder, diffusion, names[start:start + BATCH], SIZE, seed=start
        )
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(batches)


def measure_layouts(segmenter, classifier, images, names: list[str], layouts) -> dict:
    """Mean IoU with the layouts, prompt accuracy, and the fraction for which both are right."""
    found = segmenter.segment(images)
    ious = []
    for order in (1, -1):
        wanted = torch.stack([
            segmenter.labels(parts, attributes(name).ingredients[::order])
            for parts, name in zip(layouts, names)
        ])
        ious.append(mean_iou(found, wanted))
    iou = torch.stack(ious).amax(dim=0)                                         # [N]
    is_named = torch.tensor(
        classifier.exact_matches(images, [attributes(name) for name in names])
    )
    return {
        "mean IoU": float(iou.mean()),
        "prompt accuracy": float(is_named.float().mean()),
        "both right": float((is_named & (iou >= MIN_IOU)).float().mean()),
    }


def swap_names(names: list[str]) -> list[str]:
    """For each name another one with the same way of cooking, of the held-out names."""
    rng = random.Random(1)
    by_way = {}
    for name in dish_names("held_out"):
        by_way.setdefault(attributes(name).way, []).append(name)
    return [
        rng.choice([other for other in by_way[attributes(name).way] if other != name])
        for name in names
    ]


# ------------------------------------------------------------------ inpainting


def measure_inpainting(model, controlnet, classifier, dishes, names: list[str]) -> list[dict]:
    """Rows of the second table: accuracy of what the camera uncovers, evaluations and seconds."""
    unet, encoder, diffusion, _ = model
    calls = 0

    def count_call(*_):
        nonlocal calls
        calls += 1

    hook = unet.register_forward_hook(count_call)
    canvases = []
    start = time.perf_counter()
    for dish, name in zip(tqdm(dishes, desc="inpainting"), names):
        inpaint = make_control_inpainter(
            unet, controlnet, encoder, diffusion, name,
            generator=torch.Generator().manual_seed(1),
        )
        view = inpaint(*uncover(dish, "right", animate.CAMERA_STEP))
        canvases.append(np.concatenate([dish, view[:, -animate.CAMERA_STEP:]], axis=1))
    seconds = (time.perf_counter() - start) / len(names)
    hook.remove()
    canvas = np.stack(canvases)                                 # [N, 64, 64 + CAMERA_STEP, 3]
    rows = []
    for offset in (32, animate.CAMERA_STEP):
        view = torch.from_numpy(canvas[:, :, offset:offset + SIZE].copy()).permute(0, 3, 1, 2)
        rows.append({
            "camera offset (pixels)": offset,
            "accuracy": classify_dishes(classifier, view, names),
            "evaluations of the UNet": calls / len(names),
            "seconds": seconds,
        })
    return rows


# ------------------------------------------------------------------ the command


def train_or_load_controlnet(model, kind: str, minutes: float, out: Path, quick: bool):
    """Train the ControlNet of a kind with the command's presets, or load it."""
    path = out / f"controlnet_{kind}_{SIZE}.safetensors"
    arguments = ["--control", kind, "--minutes", str(minutes), "--out", str(out)]
    if quick:
        arguments += ["--dishes", "64", "--batch-size", "8"]
    train_control.main(arguments)
    return load_controlnet(path, model.network)[0]


def main():
    options = make_parser(
        "control", __doc__, out=Path("out"), minutes=2.0 if torch.cuda.is_available() else 8.0
    ).parse_args()
    quick = options.quick
    out = options.out / "quick" if quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    model = load_model(WEIGHTS, SIZE)
    minutes = 0.05 if quick else options.minutes
    count = 4 if quick else 200

    # What measures
    segmenter = load_or_train_segmenter(out, *((200, 20) if quick else (20_000, 2000)))
    pixel_accuracy = measure_segmenter(segmenter, count)
    print(f"the segmenter finds {pixel_accuracy:.1%} of the pixels of new drawn dishes")
    if pixel_accuracy < MIN_PIXEL_ACCURACY and not quick:
        raise SystemExit(f"below {MIN_PIXEL_ACCURACY:.0%} it cannot measure layouts")
    classifier, _ = load_checked_classifier(SIZE, out, quick, count)

    # Layouts
    controlnet = train_or_load_controlnet(model, "parts", minutes, out, quick)
    rng = random.Random(0)
    names = rng.choices(dish_names("held_out"), k=count)
    layouts = draw_layouts(names)
    rows = []
    for row, asked, control in (
        ("without control", names, None),
        ("its own layout", names, layouts),
        ("another layout", swap_names(names), layouts),
    ):
        images = sample(model, controlnet, asked, control)
        rows.append(
            {"control": row} | measure_layouts(segmenter, classifier, images, asked, layouts)
        )
        print(rows[-1], flush=True)

    # Inpainting
    inpainter = train_or_load_controlnet(model, "inpaint", minutes, out, quick)
    view_classifier = animate.load_or_train_view_classifier(
        out, *((500, 20) if quick else (30_000, 2800))
    )
    animate.measure_view_classifier(view_classifier, quick)
    names = random.Random(0).sample(dish_names("held_out"), count)
    dishes = generate.generate_images(*model[:3], names, SIZE, seed=0)
    views = measure_inpainting(model, inpainter, view_classifier, dishes, names)

    claims = {
        "segmenter_pixels": pixel_accuracy,
        "uncontrolled_miou": rows[0]["mean IoU"],
        "layout_miou": rows[1]["mean IoU"],
        "prompt_accuracy": rows[1]["prompt accuracy"],
        "swap_accuracy": rows[2]["both right"],
        "inpainter_half_way": views[0]["accuracy"],
        "inpainter_at_the_end": views[1]["accuracy"],
        "film_network_calls": views[0]["evaluations of the UNet"],
    }
    finish("control", claims, rows, quick, views=views)


if __name__ == "__main__":
    main()
