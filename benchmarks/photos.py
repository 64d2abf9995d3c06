"""From a folder of photographs to samples: reconstruction, samples and copies, over hours.

    python -m benchmarks.photos --photos FOLDER [--quick]

FOLDER has one subfolder per dish. Without it drawn dishes take the place of photographs.

The main table compares the terms of the autoencoder's loss, on photographs and on drawn dishes.
Each autoencoder starts from the weights of this repository and is trained for the same steps on
views of the training images, half as many on drawn dishes. On the test images it is judged by PSNR,
SSIM, sharpness, the accuracy of the linear probe, and the distance in the features of another
network, EfficientNet-Lite 2. losses.png in --out, and in its subfolder drawn_dishes, show the test
images in the first row, and below them a row for each loss.

Then `python -m easy_diffusion.train_photos` runs with its presets. Its log is the second table:
accuracy, distances and copies over the time of the training.

Third table: the ten camera moves over samples, over test photographs, and over drawn dishes with
the network of this repository. The seam says how visible the border of the inpainted regions is,
see evaluation/metrics.py. films_*.gif in --out show one image of each kind.

All trainings are resumed by the same command, and not repeated once they are done.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from tqdm.auto import tqdm

from datasets.dishes import dish_names, draw_dish
from easy_diffusion import photo_presets, presets, train_photos
from easy_diffusion.animation.camera import MOVES
from easy_diffusion.animation.film import animate, mosaic, write_film
from easy_diffusion.evaluation.metrics import psnr, seam, sharpness, ssim
from easy_diffusion.evaluation.photo_classifier import PhotoMetrics
from easy_diffusion.files import write_atomically
from easy_diffusion.generate import make_model_inpainter
from easy_diffusion.images import contact_sheet, encode_png
from easy_diffusion.networks.autoencoder import Autoencoder, load_autoencoder
from easy_diffusion.networks.image_features import ImageFeatures
from easy_diffusion.networks.weights_io import load_weights
from easy_diffusion.photo_presets import Photographs
from easy_diffusion.pretrained import WEIGHTS, Model, autoencoder_path, find_sizes, load_model
from easy_diffusion.training.autoencoder_losses import FeatureDistance, PatchDiscriminator
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.progress import track_progress
from easy_diffusion.training.train_autoencoder import train_autoencoder

from .report import finish, make_parser

LOSSES = {
    "absolute": dict(squared=0.0),
    "+ squared": dict(),
    "+ squared, structure": dict(structure=1.0),
    "+ squared, discriminator": dict(discriminator=True, discriminator_from=0.25),
    "+ squared, features 0.3": dict(perceptual="efficientnet", perceptual_weight=0.3),
    "+ squared, features 1": dict(perceptual="efficientnet", perceptual_weight=1.0),
}


def parse_options() -> argparse.Namespace:
    parser = make_parser("photos", __doc__, out=Path("out/photos"))
    parser.add_argument("--photos", type=Path, help="one subfolder of photographs per dish")
    parser.add_argument(
        "--loss-steps", type=int, default=2000 if torch.cuda.is_available() else 200,
        help="training steps of each autoencoder that is compared",
    )
    parser.add_argument(
        "--minutes", type=float, help="of the network, see easy_diffusion.train_photos"
    )
    return parser.parse_args()


def draw_photographs(folder: Path, size: int, dishes: int, per_dish: int) -> Path:
    """Write drawn dishes as a folder of photographs, unless it is there."""
    for name in dish_names("train")[::150][:dishes]:
        if (folder / name).exists():
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed in range(per_dish):
            pixels = draw_dish(name, size + 16, seed).transpose(1, 2, 0)
            Image.fromarray(pixels).save(folder / name / f"{seed}.png")
    return folder


def compare_losses(
    kind: str, photographs: Photographs, metrics: PhotoMetrics, size: int, count: int, out: Path
) -> list[dict]:
    """Train an autoencoder with each of the LOSSES; returns a row for each.

    kind: of the images, for the rows.
    count: of training steps.
    out: folder for the checkpoints in losses/, and losses.png.
    """
    images, names = photographs.test_images, photographs.test_names
    judge = FeatureDistance(ImageFeatures("lite2")).to(presets.default_device())
    (out / "losses").mkdir(parents=True, exist_ok=True)
    shown = slice(None, None, max(1, len(images) // 8))
    rows = []
    sheet = [[image] for image in images[shown][:8]]
    for number, (name, changes) in enumerate(LOSSES.items()):
        torch.manual_seed(0)
        autoencoder = Autoencoder(**presets.AUTOENCODER)
        if autoencoder_path(WEIGHTS, size).exists():
            autoencoder = load_autoencoder(autoencoder_path(WEIGHTS, size))
        if changes.get("discriminator"):
            changes = changes | {"discriminator": PatchDiscriminator()}
        checkpoint = out / "losses" / f"{number}.safetensors"
        steps = train_autoencoder(
            autoencoder.train(),
            make_loader(presets.Mirrored(photographs.store), presets.AUTOENCODER_BATCH),
            steps=count,
            checkpoint=checkpoint,
            **presets.AUTOENCODER_TRAINING | changes,
        )
        for _ in track_progress(steps, description=name):
            pass
        saved = load_checkpoint(checkpoint)
        load_weights(autoencoder, saved["models"]["ema"])
        y = presets.reconstruct(autoencoder.eval().to(presets.default_device()), images)
        row = {"images": kind, "loss": name, "seconds per step": saved["seconds"] / count}
        row |= measure(images, y, judge) | train_photos.measure_accuracy(metrics, y, names)
        rows.append(row)
        tqdm.write(str(row))
        sheet += [[image] for image in y[shown][:8]]
    cells = [[image.permute(1, 2, 0).numpy() for image in cell] for cell in sheet]
    sheet = contact_sheet(cells, None, columns=8, side=size)
    write_atomically(out / "losses.png", encode_png(sheet))
    return rows


@torch.no_grad()
def measure(images, y, judge: FeatureDistance) -> dict:
    """Quality of reconstructions y of images, both uint8 [N, 3, H, W]."""
    device = next(judge.parameters()).device
    pairs = zip(images.split(32), y.split(32))
    distances = [judge(*(x.to(device) / 127.5 - 1 for x in pair)) for pair in pairs]
    return {
        "psnr_db": float(psnr(images, y).mean()),
        "ssim": float(ssim(images, y).mean()),
        "sharpness": float((sharpness(y) / sharpness(images)).mean()),
        "feature_distance": float(torch.cat(distances).mean()),
    }


def measure_films(model: Model, images, names: list[str], steps: int, path: Path) -> dict:
    """Animate images with the ten moves, as the demo does; returns the mean seam for each move.

    model: the trained networks of the inpainter.
    images, names: uint8 [N, 3, H, W], and the captions to inpaint with; "": without caption.
    steps: noise levels of RePaint.
    path: GIF file for the films of the first image.
    """
    seams, films = {}, []
    for move in tqdm(MOVES, desc="films"):
        values = []
        for i, (image, name) in enumerate(zip(images, names)):
            inpaint, inpaint_around = (
                make_measuring_inpainter(model, caption, steps, values) for caption in (name, "")
            )
            film = animate(
                image.permute(1, 2, 0).numpy(), move, inpaint, inpaint_around=inpaint_around,
                seconds=2.0, fps=10,
            )
            if i == 0:
                films.append(film)
        seams[move] = mean(values)
    write_film(path, mosaic(films, list(MOVES), columns=5, side=images.shape[2]), fps=10)
    return seams


def make_measuring_inpainter(model: Model, name: str, steps: int, seams: list[float]):
    """Make an inpainter that appends the seam of each of its results to `seams`."""
    guidance = photo_presets.GUIDANCE if name else 1.0
    inpaint = make_model_inpainter(*model, name, steps, guidance)

    def inpaint_and_measure(view, mask):
        image = inpaint(view, mask)                                         # [H, W, 3]
        channels_first = torch.from_numpy(image).permute(2, 0, 1)[None]
        seams.append(float(seam(channels_first, torch.from_numpy(mask))))
        return image

    return inpaint_and_measure


def read_log(path: Path) -> list[dict]:
    """The rows of the training's log that have measurements."""
    columns = ("top1", "top5", "kernel_distance", "copied_fraction")
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"minutes": float(row["seconds"]) / 60, "steps": int(row["index"]) + 1}
            | {column: float(row[column]) for column in columns}
            for row in csv.DictReader(file) if row["top1"]
        ]


def main():
    options = parse_options()
    quick = options.quick
    size = 32 if quick else photo_presets.SIZE
    drawn_out = options.out / "drawn_dishes"
    dishes, per_dish = (6, 20) if quick else (20, 30)
    drawn = draw_photographs(drawn_out / "images", size, dishes, per_dish)
    folders = {"photographs": options.photos, "drawn dishes": drawn}
    if options.photos is None:
        del folders["photographs"]

    # The terms of the autoencoder's loss
    rows = []
    for kind, folder in folders.items():
        out = drawn_out if folder == drawn else options.out
        photographs = photo_presets.prepare_views(folder, out, size, 2 if quick else 5)
        metrics = photo_presets.prepare_metrics(photographs, out / "features.safetensors")
        count = 2 if quick else options.loss_steps
        if kind == "drawn dishes":
            count = count // 2          # the first weights were trained on such images
        rows += compare_losses(kind, photographs, metrics, size, count, out)
        if kind == next(iter(folders)):
            tested = photographs

    # From the folder to samples
    folder = next(iter(folders.values()))
    arguments = [str(folder), "--out", str(options.out), "--size", str(size)]
    if quick:
        arguments += ["--views", "2", "--minutes", "0.05", "--autoencoder-minutes", "0.05"]
        arguments += ["--samples", "6", "--batch-size", "16"]
    elif options.minutes is not None:
        arguments += ["--minutes", str(options.minutes)]
    train_photos.main(arguments)
    report = json.loads((options.out / "report.json").read_text("utf-8"))
    progress = read_log(options.out / "log.csv")

    # Films
    count, steps = (1, 2) if quick else (2, 25)
    model = load_model(options.out / "weights", size)
    names = tested.test_names[:count]
    samples, _ = train_photos.sample_photos(model, names, count, size)
    filmed = {
        "samples": (model, samples, names),
        "photographs": (model, tested.test_images[:count], [""] * count),
    }
    if size in find_sizes(WEIGHTS):
        names = dish_names("held_out")[:count]
        dishes = torch.stack([torch.from_numpy(draw_dish(name, size, seed=1)) for name in names])
        filmed["drawn dishes"] = (load_model(WEIGHTS, size), dishes, names)
    seams = {
        kind: measure_films(*films, steps, options.out / f"films_{kind.replace(' ', '_')}.gif")
        for kind, films in filmed.items()
    }
    films = [{"move": move} | {kind: seams[kind][move] for kind in seams} for move in MOVES]
    for row in films:
        print(row)
    seconds = sum(
        load_checkpoint(options.out / name)["seconds"]
        for name in (f"autoencoder_{size}.training.safetensors", "model.safetensors")
    )
    claims = {
        "photos_top1": report["real"]["top1"],
        "photos_top5": report["real"]["top5"],
        "reconstructed_top1": report["reconstructed"]["top1"],
        "psnr_db": report["reconstructed"]["psnr_db"],
        "best_psnr_db": max(row["psnr_db"] for row in rows if row["images"] == rows[0]["images"]),
        "samples_top1": report["samples"]["top1"],
        "samples_top5": report["samples"]["top5"],
        "kernel_distance": report["samples"]["kernel_distance"],
        "first_kernel_distance": progress[0]["kernel_distance"],
        "copied_share": report["samples"]["copied_fraction"],
        "hours": seconds / 3600,
    }
    claims |= {f"seam_{kind.replace(' ', '_')}": mean(seams[kind].values()) for kind in seams}
    name = "photos" if options.photos else "photos_drawn"
    finish(name, claims, rows, quick, progress=progress, films=films)


if __name__ == "__main__":
    main()
