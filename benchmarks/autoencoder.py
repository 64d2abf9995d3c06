"""What an autoencoder of so many minutes gives back, over f and latent channels, at 128×128: python -m benchmarks.autoencoder [--quick]

The demo's autoencoder in several shapes, each trained for the same time on the same pictures: PSNR, SSIM and sharpness of held-out dishes,
and how many of them a reader still reads fully right.
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from easy_diffusion import presets
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.train_autoencoder import train_autoencoder

from .fidelity import LEAST_READER_ACCURACY, drawings, trained_reader
from .latent import judge_of, quality
from .report import finish

SHAPES = [dict(patch=4, latent_channels=4), dict(patch=4, latent_channels=8), dict(patch=4, latent_channels=16),
          dict(patch=2, latent_channels=4)]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoencoder", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything; the figures are not kept")
    parser.add_argument("--minutes", type=float, default=0.75 if torch.cuda.is_available() else 3.0, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where dishes and reader are kept")
    options = parser.parse_args()
    size, minutes = (32, 0.05) if options.quick else (128, options.minutes)
    pictures = presets.prepare_dishes(options.out / f"dishes_{size}", 200 if options.quick else presets.DISHES, size)
    judge = judge_of(trained_reader(size, 40, options.out, 1000) if options.quick else trained_reader(size, 1300, options.out, 20_000))
    real, real_names = drawings(50 if options.quick else 500, size, "held_out", 102)
    accuracy = judge(real, real_names)
    print(f"the reader reads {accuracy:.1%} of {len(real)} held-out drawings fully right", flush=True)
    if accuracy < LEAST_READER_ACCURACY and not options.quick:
        raise SystemExit(f"below {LEAST_READER_ACCURACY:.0%} it measures nothing")
    rows = []
    for shape in SHAPES:
        torch.manual_seed(0)
        for step in tqdm(train_autoencoder(Autoencoder(**presets.AUTOENCODER | shape), make_loader(pictures, presets.AUTOENCODER_BATCH),
                                           minutes=minutes, steps=10 ** 7, **presets.AUTOENCODER_TRAINING), desc=str(shape)):
            pass
        rows.append({"steps": step.index + 1} | quality(step.autoencoder, judge, real, real_names))
        tqdm.write(str(rows[-1]))
    best = max(rows, key=lambda row: row["PSNR"])
    finish("autoencoder", {"minutes": minutes, "best_psnr_db": best["PSNR"], "its_reader_accuracy": best["read fully right"],
                           "its_compression": best["fewer numbers"], "reader_accuracy_of_real": accuracy}, rows, options.quick)


if __name__ == "__main__":
    main()
