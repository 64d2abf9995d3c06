"""From a folder of photographs to samples: python -m easy_diffusion.train_photos FOLDER

FOLDER has one subfolder per dish, whose name is the caption of the photographs in it. The command

    1. stores several views of each photograph; a tenth of the photographs is kept out for tests,
    2. trains a linear probe on ImageNet features, which tells the dishes apart,
    3. trains an autoencoder on the views, from the weights of this repository on,
    4. encodes them and their mirror images,
    5. trains a UNet on the latents; every --evaluate-minutes it samples and measures,
    6. reports: accuracy of real photographs, of reconstructions and of samples; kernel and Fréchet
       distance; and how many samples are suspected of being copies of training photographs.

Each step is resumed by the same command, and not repeated once it is done. The files in --out are

    weights/                 the trained model, for the option --weights of easy_diffusion.demo
    samples.png              a sample of each name, renewed with each evaluation
    neighbours.png           samples (left) beside their nearest training photographs (right)
    autoencoder_128.png      test photographs (left) and their reconstructions (right)
    log.csv, log.png         loss and measurements over the training
    report.json              the measurements at the end
    photos_128/, features.safetensors, autoencoder_128*.safetensors, latents_128/,
    model.safetensors        the results of the steps

>>> options = parse_options(["my_food", "--minutes", "30"])
>>> options.folder.name, options.minutes, options.autoencoder_minutes
('my_food', 30.0, 15.0)
"""

import argparse
import json
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from . import photo_presets
from .command_line import RESUMES, check_ranges, run_command
from .command_setup import check_size, prepare_command
from .evaluation.metrics import psnr, ssim
from .evaluation.photo_classifier import PhotoMetrics, compute_features, nearest_neighbours
from .files import write_atomically
from .generate import generate_images
from .images import contact_sheet, encode_png
from .networks.autoencoder import Autoencoder, load_autoencoder
from .photo_presets import Photographs
from .presets import (
    default_batch_size,
    evaluate_autoencoder,
    prepare_latents,
    reconstruct,
    train_demo,
)
from .pretrained import WEIGHTS, Model, autoencoder_path, save_model
from .training.checkpoint import load_checkpoint, load_ema_weights
from .training.distributed import default_device
from .training.progress import track_progress

EVALUATION_SEED = 1000      # of the samples that are measured
SAMPLE_BATCH = 50           # samples that are generated at once


def parse_options(arguments) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.train_photos",
        description="Train a text-to-image model on a folder of photographs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="one subfolder of photographs per dish; its name is the caption"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0 if torch.cuda.is_available() else 120.0,
        help="training time of the network",
    )
    parser.add_argument(
        "--autoencoder-minutes", type=float, default=argparse.SUPPRESS,
        help="training time of the autoencoder (default: half of --minutes)",
    )
    parser.add_argument(
        "--size", type=int, default=photo_presets.SIZE,
        help="height and width of the images in pixels, a multiple of 16",
    )
    parser.add_argument(
        "--views", type=int, default=photo_presets.VIEWS,
        help="number of different crops of each training photograph",
    )
    parser.add_argument(
        "--batch-size", type=int, default=default_batch_size(latent=True),
        help="latents per training step of the network",
    )
    parser.add_argument(
        "--evaluate-minutes", type=float, default=argparse.SUPPRESS,
        help="training time of the network between two evaluations (default: a sixth of --minutes)",
    )
    parser.add_argument(
        "--samples", type=int, default=200, help="number of samples in an evaluation",
    )
    parser.add_argument(
        "--initial-weights", type=Path, default=WEIGHTS, metavar="FOLDER",
        help="start the autoencoder from the one in this folder, if it has one of --size",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/photos"), metavar="FOLDER",
        help="folder for the views, the checkpoints and the results",
    )
    options = parser.parse_args(arguments)
    if not hasattr(options, "autoencoder_minutes"):
        options.autoencoder_minutes = options.minutes / 2
    if not hasattr(options, "evaluate_minutes"):
        options.evaluate_minutes = options.minutes / 6
    check_size(parser, options.size)
    check_ranges(parser, options, {
        "minutes": (1e-3, math.inf),
        "autoencoder_minutes": (1e-3, math.inf),
        "views": (1, math.inf),
        "batch_size": (1, math.inf),
        "evaluate_minutes": (1e-3, math.inf),
        "samples": (4, math.inf),
    })
    return options


def main(arguments=None) -> int:
    """Train on a folder of photographs; see the module's docstring. Returns the exit status."""
    options = parse_options(arguments)
    prepare_command(options.out)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"

    if options.initial_weights and not options.initial_weights.is_dir():
        raise FileNotFoundError(f"--initial-weights {options.initial_weights} is not a folder")
    photo_presets.check_photo_networks([""], options.size)
    photographs = photo_presets.prepare_views(
        options.folder, options.out, options.size, options.views
    )
    metrics = photo_presets.prepare_metrics(photographs, options.out / "features.safetensors")
    photo_presets.check_photo_networks(metrics.names, options.size)
    print(
        f"{len(photographs.store)} views of training photographs, "
        f"{len(photographs.test_names)} test photographs of {len(metrics.names)} dishes, "
        f"{photographs.skipped} files skipped", flush=True,
    )
    report = {"real": measure_accuracy(metrics, photographs.test_images, photographs.test_names)}
    latents, autoencoder = prepare_autoencoder(options, photographs, metrics)
    report["reconstructed"] = measure_reconstruction(photographs, autoencoder, metrics)
    for name, row in report.items():
        print(name, row, flush=True)

    model = train_network(options, latents, autoencoder, metrics)
    samples, names = sample_photos(model, metrics.names, options.samples, options.size)
    report["samples"] = metrics.measure(samples, names)
    print("samples", report["samples"])
    write_neighbours(options.out / "neighbours.png", samples, names, photographs, metrics)
    write_atomically(options.out / "report.json", json.dumps(report, indent=1).encode())
    for name in ("weights", "samples.png", "neighbours.png", "report.json"):
        print(f"wrote {options.out / name}")
    return 0


def measure_accuracy(metrics: PhotoMetrics, images, names) -> dict:
    """Top-1 and top-5 accuracy of the probe on images uint8 [N, 3, H, W].

    Images of dishes without a training photograph are left out; of no image the accuracy is NaN.
    """
    known = [i for i, name in enumerate(names) if name in metrics.names]
    if not known:
        return {"top1": math.nan, "top5": math.nan}
    images, names = images[known], [names[i] for i in known]
    return {f"top{k}": metrics.accuracy(images, names, k) for k in (1, 5)}


def prepare_autoencoder(options, photographs: Photographs, metrics: PhotoMetrics) -> tuple:
    """Train the autoencoder and encode the views, or load them: (latents, autoencoder)."""
    path = autoencoder_path(options.initial_weights, options.size)
    initial = load_autoencoder(path) if path.exists() else None
    evaluate = partial(
        evaluate_autoencoder,
        images=photographs.test_images,
        names=photographs.test_names,
        measure_accuracy=lambda images, names: measure_accuracy(metrics, images, names)["top1"],
    )
    return prepare_latents(
        photographs.store, options.out, options.size, options.autoencoder_minutes, evaluate,
        initial, mirrored=True, **photo_presets.AUTOENCODER_TRAINING,
    )


def measure_reconstruction(
    photographs: Photographs, autoencoder: Autoencoder, metrics: PhotoMetrics
) -> dict:
    """PSNR and SSIM of the reconstructed test photographs, and the accuracy on them."""
    images = photographs.test_images
    reconstructions = reconstruct(autoencoder, images)
    quality = {
        "psnr_db": float(psnr(images, reconstructions).mean()),
        "ssim": float(ssim(images, reconstructions).mean()),
    }
    return quality | measure_accuracy(metrics, reconstructions, photographs.test_names)


def train_network(options, latents, autoencoder: Autoencoder, metrics: PhotoMetrics) -> Model:
    """Train the network on the latents, or resume its training; returns the model.

    At every evaluation it writes samples.png and logs the measurements.
    """
    torch.manual_seed(0)
    networks = photo_presets.build_photo_networks("".join(metrics.names), autoencoder)
    network, encoder, diffusion = networks
    weights = sum(parameter.numel() for parameter in network.parameters())
    print(f"{weights / 1e6:.1f} M weights, {len(latents)} latents", flush=True)

    def evaluate(step) -> dict:
        model = Model(step.ema_network, step.ema_encoder, diffusion, autoencoder)
        write_samples(options.out / "samples.png", model, metrics.names, options.size)
        samples, names = sample_photos(model, metrics.names, options.samples, options.size)
        return metrics.measure(samples, names)

    checkpoint = options.out / "model.safetensors"
    steps = train_demo(
        network, encoder, diffusion, latents, checkpoint, options.minutes,
        min(options.batch_size, len(latents)),
    )
    columns = ["top1", "top5", "kernel_distance", "frechet_distance", "copied_fraction"]
    for _ in track_progress(
        steps, csv=options.out / "log.csv", evaluate=evaluate,
        evaluate_minutes=options.evaluate_minutes, extra_columns=[*columns, "copy_distance"],
    ):
        pass
    saved = load_checkpoint(checkpoint)
    load_ema_weights(network, encoder, diffusion, saved)
    device = default_device()
    model = Model(network.to(device), encoder.to(device), diffusion, autoencoder)
    training = {"steps": saved["index"], "minutes": round(saved["seconds"] / 60, 1)}
    save_model(options.out / "weights", options.size, model, training)
    return model


def sample_photos(
    model: Model, names: list[str], count: int, size: int
) -> tuple[torch.Tensor, list[str]]:
    """Sample `count` images, the names in turn: (images uint8 [count, 3, H, W], their names)."""
    network, encoder, diffusion, autoencoder = model
    names = [names[i % len(names)] for i in range(count)]
    batches = []
    for start in range(0, count, SAMPLE_BATCH):
        images = generate_images(
            network, encoder, diffusion, names[start:start + SAMPLE_BATCH], size,
            guidance=photo_presets.GUIDANCE, seed=EVALUATION_SEED + start, autoencoder=autoencoder,
        )                                                                   # [B, H, W, 3]
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(batches), names


def write_samples(path: Path, model: Model, names: list[str], size: int) -> None:
    """Write a contact sheet with a sample of each name, at most 40."""
    samples, names = sample_photos(model, names, min(40, len(names)), size)
    cells = [[image] for image in samples.permute(0, 2, 3, 1).numpy()]
    write_atomically(path, encode_png(contact_sheet(cells, names, columns=5, side=size)))


def write_neighbours(
    path: Path, samples, names: list[str], photographs: Photographs, metrics: PhotoMetrics
) -> None:
    """Write the twelve samples nearest to a training photograph (left), each with it (right)."""
    features = compute_features(metrics.network, samples)
    distances, nearest = nearest_neighbours(features, metrics.training)
    cells, captions = [], []
    for i in distances.argsort()[:12].tolist():
        image, name = photographs.store[int(nearest[i])]
        cells.append([x.permute(1, 2, 0).numpy() for x in (samples[i], image)])
        captions.append(f"{names[i]} · {name} {distances[i]:.2f}")
    sheet = contact_sheet(cells, captions, columns=3, side=samples.shape[2])
    write_atomically(path, encode_png(sheet))


if __name__ == "__main__":
    sys.exit(run_command(main, RESUMES))
