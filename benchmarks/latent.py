"""Diffusion in pixels, on kept latents, and on latents encoded by the loader, at 128×128: python -m benchmarks.latent [--quick]

The autoencoder is the demo's, trained here or by the demo with --latent; what it gives back of held-out dishes is measured (PSNR, SSIM,
sharpness, and how many a reader reads fully right). Then the demo's network learns for the same minutes in three ways, with the same
channels and the same sampler: from pixels (in patches of 4×4, as in the demo), from latents on disk (scheme one), and from latents that the
loader encodes (scheme two); the reader reads what each draws for held-out names after half and after all of the time.
"""

import argparse
import random
from pathlib import Path

import torch
from tqdm.auto import tqdm

from datasets.dishes import attributes, dish_names
from easy_diffusion import recipe
from easy_diffusion.batches import batches
from easy_diffusion.latent import EncodedBatch, decoded, encoder_of
from easy_diffusion.metrics import psnr, share, sharpness, ssim
from easy_diffusion.train import train

from .fidelity import LEAST_READER_ACCURACY, drawings, trained_reader
from .report import finish


def quality(autoencoder, reader, pictures, names) -> dict:
    """What an autoencoder gives back of pictures uint8 [B, 3, H, W]."""
    encode = encoder_of(autoencoder)
    back = torch.cat([torch.from_numpy(decoded(autoencoder, encode(some)[0])).permute(0, 3, 1, 2) for some in pictures.split(50)])
    right = share(reader.fully_right(back, [attributes(name) for name in names]))
    return {"PSNR": float(psnr(pictures, back).mean()), "SSIM": float(ssim(pictures, back).mean()),
            "sharpness": float((sharpness(back) / sharpness(pictures)).mean()), "read fully right": right}


def fidelity(reader, step, diffusion, autoencoder, names, size):
    """The share of names whose sample is read fully right."""
    pictures = torch.cat([torch.from_numpy(recipe.sample(step.network, step.encoder, diffusion, names[i:i + 100], size, seed=i,
                                                       autoencoder=autoencoder)).permute(0, 3, 1, 2) for i in range(0, len(names), 100)])
    return share(reader.fully_right(pictures, [attributes(name) for name in names]))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything; the figures are not kept")
    parser.add_argument("--minutes", type=float, default=2.5 if torch.cuda.is_available() else 10.0, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where dishes, reader and autoencoder are kept")
    options = parser.parse_args()
    size, minutes, count = (32, 0.05, 20) if options.quick else (128, options.minutes, 300)
    pictures = recipe.prepare(options.out / f"dishes_{size}", 200 if options.quick else recipe.DISHES, size)
    latents, autoencoder = recipe.prepare_latents(pictures, options.out, size, minutes)
    reader = trained_reader(size, 40, options.out, 1000) if options.quick else trained_reader(size, 1600, options.out, 20_000)
    real, real_names = drawings(100 if options.quick else 1000, size, "held_out", 102)
    accuracy = share(reader.fully_right(real, [attributes(name) for name in real_names]))
    print(f"the reader reads {accuracy:.1%} of {len(real)} held-out drawings fully right")
    if accuracy < LEAST_READER_ACCURACY and not options.quick:
        raise SystemExit(f"below {LEAST_READER_ACCURACY:.0%} it measures nothing")
    back = quality(autoencoder, reader, real, real_names)
    print(back)

    names = random.Random(0).sample(dish_names("held_out"), count)
    schemes = {"pixels": (pictures, None, None), "latents, kept": (latents, None, autoencoder),
               "latents, encoded each time": (pictures, EncodedBatch(autoencoder, next(autoencoder.parameters()).device), autoencoder)}
    rows, speed = [], {}
    for scheme, (data, collate, space) in schemes.items():
        torch.manual_seed(0)
        network, encoder, diffusion = recipe.build("".join(dish_names("train")), space)
        walk, moments = train(network, diffusion, batches(data, recipe.BATCH, collate=collate), encoder, minutes=minutes, steps=10 ** 7,
                              **recipe.TRAINING), [0.5, 1.0]
        for step in tqdm(walk, desc=scheme, unit="step"):
            if step.progress >= moments[0]:
                moments.pop(0)
                speed[scheme] = step.pictures_per_second
                right = fidelity(reader, step, diffusion, space, names, size)
                rows.append({"scheme": scheme, "minutes": round(step.seconds / 60, 2), "pictures": (step.index + 1) * recipe.BATCH,
                             "pictures/s": step.pictures_per_second, "held_out_fidelity": right})
                tqdm.write(str(rows[-1]))
    disk = [{"store": name, "MB per 1,000": (options.out / f"{name}_{size}" / "data.mdb").stat().st_size / len(pictures) / 1e3}
            for name in ("dishes", "latents")]
    numbers = 3 * size ** 2 / (autoencoder.settings["latent_channels"] * (size // autoencoder.factor) ** 2)
    finish("latent", {"train_speedup": speed["latents, kept"] / speed["pixels"], "psnr_db": back["PSNR"],
                      "reader_accuracy": back["read fully right"], "compression": numbers,
                      "reader_accuracy_of_real": accuracy}, rows, options.quick,
           autoencoder=[{"f": autoencoder.factor, "channels": autoencoder.settings["latent_channels"], **back}], disk=disk)


if __name__ == "__main__":
    main()
