"""Reconstruction quality of autoencoders of different shapes, each trained for the same time.

    python -m benchmarks.autoencoder [--quick]

The shapes differ in f, the factor by which the autoencoder reduces height and width, and in the
number of latent channels. All are trained on the same dishes of 128×128 pixels. Measured on
held-out dishes: PSNR, SSIM and sharpness of the reconstructions, and the fraction of them that an
attribute classifier still classifies exactly.
"""

from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from easy_diffusion import dish_classifier, presets
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.train_autoencoder import train_autoencoder

from .fidelity import check_classifier_accuracy, classify_dishes
from .latent import measure_reconstruction
from .report import finish, make_parser

SHAPES = [
    dict(patch=4, latent_channels=4),
    dict(patch=4, latent_channels=8),
    dict(patch=4, latent_channels=16),
    dict(patch=2, latent_channels=4),
]


def main():
    options = make_parser(
        "autoencoder", __doc__, out=Path("out"), minutes=0.75 if torch.cuda.is_available() else 3.0
    ).parse_args()
    quick = options.quick
    size = 32 if quick else 128
    minutes = 0.05 if quick else options.minutes

    # Data and classifier
    dish_count = 200 if quick else presets.DISHES
    store = presets.prepare_dishes(options.out / f"dishes_{size}", dish_count, size)
    if quick:
        classifier = dish_classifier.load_or_train_classifier(size, 40, options.out, 1000)
    else:
        classifier = dish_classifier.load_or_train_classifier(size, 1300, options.out, 20_000)
    measure_accuracy = partial(classify_dishes, classifier)
    images, names = dish_classifier.draw_dishes(50 if quick else 500, size, "held_out", 102)
    accuracy = measure_accuracy(images, names)
    check_classifier_accuracy(accuracy, quick)

    # One training per shape
    rows = []
    for shape in SHAPES:
        torch.manual_seed(0)
        training = train_autoencoder(
            Autoencoder(**presets.AUTOENCODER | shape),
            make_loader(store, presets.AUTOENCODER_BATCH),
            minutes=minutes,
            steps=None,
            **presets.AUTOENCODER_TRAINING,
        )
        for step in tqdm(training, desc=str(shape)):
            pass
        quality = measure_reconstruction(step.autoencoder, measure_accuracy, images, names)
        rows.append({"steps": step.index + 1} | quality)
        tqdm.write(str(rows[-1]))

    best = max(rows, key=lambda row: row["PSNR"])
    claims = {
        "minutes": minutes,
        "best_psnr_db": best["PSNR"],
        "its_reader_accuracy": best["prompt accuracy"],
        "its_compression": best["compression"],
        "reader_accuracy_of_real": accuracy,
    }
    finish("autoencoder", claims, rows, quick)


if __name__ == "__main__":
    main()
