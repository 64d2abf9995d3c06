"""Diffusion in pixels, on kept latents, and on latents encoded by the loader, at 128×128: python -m benchmarks.latent [--quick]

First a reader of 128×128 is trained, then the demo's autoencoder: what it gives back of held-out dishes is measured (PSNR, SSIM, sharpness,
and how many the reader reads fully right; benchmarks/autoencoder.py compares some of other f and channels). Then the demo's network learns
for the same minutes in three ways, with the same channels and the same sampler: from pixels, of which it sees 4×4 as one place, and, seeing
2×2 as one, from latents on disk (scheme one) and from latents that the loader encodes (scheme two); the reader reads what each draws for
held-out names after half and after all of the time.
"""

import argparse
import random
import statistics
from pathlib import Path

import torch
from tqdm.auto import tqdm

from datasets.dishes import attributes, dish_names
from easy_diffusion import presets
from easy_diffusion.evaluation.attribute_classifier import prompt_accuracy
from easy_diffusion.evaluation.metrics import psnr, sharpness, ssim
from easy_diffusion.latent_space import EncodingCollate
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training import checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.trainer import train

from .fidelity import LEAST_READER_ACCURACY, drawings, fidelity, trained_reader
from .report import finish


def judge_of(reader):
    """(pictures uint8 [B, 3, H, W], names) → the share that the reader reads fully right."""
    def judge(pictures, names):
        return prompt_accuracy([right for i in range(0, len(names), 50)
                      for right in reader.exact_matches(pictures[i:i + 50], [attributes(name) for name in names[i:i + 50]])])

    return judge


def quality(autoencoder, judge, pictures, names) -> dict:
    """What an autoencoder gives back of pictures uint8 [B, 3, H, W]."""
    back = presets.reconstruct(autoencoder, pictures)
    channels, size = autoencoder.settings["latent_channels"], pictures.shape[-1]
    return {"f": autoencoder.factor, "channels": channels, "fewer numbers": 3 * autoencoder.factor ** 2 / channels,
            "PSNR": float(psnr(pictures, back).mean()), "SSIM": float(ssim(pictures, back).mean()),
            "sharpness": float((sharpness(back) / sharpness(pictures)).mean()), "read fully right": judge(back, names), "size": size}


def steps_per_second(pictures, steps: int = 8) -> float:
    """Of pixels by the very network that latents have, attention at its finest level included; the median of some steps."""
    _, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    network = UNet(channels=(64, 128), attention=(True, True), heads=2, patch=4, context_dim=encoder.dim, pooled=True)
    seconds = [step.seconds for step in train(network, diffusion, make_loader(pictures, presets.BATCH), encoder, steps=steps, **presets.TRAINING)]
    return 1 / statistics.median(after - before for before, after in zip(seconds[1:], seconds[2:]))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything; the figures are not kept")
    parser.add_argument("--minutes", type=float, default=2.5 if torch.cuda.is_available() else 10.0, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where dishes, reader and autoencoder are kept")
    options = parser.parse_args()
    size, minutes, count = (32, 0.05, 20) if options.quick else (128, options.minutes, 100)
    pictures = presets.prepare_dishes(options.out / f"dishes_{size}", 200 if options.quick else presets.DISHES, size)
    reader = trained_reader(size, 40, options.out, 1000) if options.quick else trained_reader(size, 1300, options.out, 20_000)
    real, real_names = drawings(50 if options.quick else 500, size, "held_out", 102)

    judge = judge_of(reader)
    accuracy = judge(real, real_names)
    print(f"the reader reads {accuracy:.1%} of {len(real)} held-out drawings fully right", flush=True)
    if accuracy < LEAST_READER_ACCURACY and not options.quick:
        raise SystemExit(f"below {LEAST_READER_ACCURACY:.0%} it measures nothing")

    latents, autoencoder = presets.prepare_latents(pictures, options.out, size, minutes, judge)
    taught = checkpoint.load_checkpoint(options.out / f"autoencoder_{size}.training.safetensors")["seconds"] / 60
    back = {"minutes": taught} | quality(autoencoder, judge, real, real_names)
    print(back, flush=True)

    names = random.Random(0).sample(dish_names("held_out"), count)
    device = next(autoencoder.parameters()).device
    schemes = {"pixels": (pictures, presets.BATCH, None, None), "latents, kept": (latents, presets.LATENT_BATCH, None, autoencoder),
               "latents, encoded each time": (pictures, presets.LATENT_BATCH, EncodingCollate(autoencoder, device), autoencoder)}
    rows, speed = [], {"pixels, the latents' network": steps_per_second(pictures) * presets.BATCH}
    for scheme, (data, batch, collate, space) in schemes.items():
        torch.manual_seed(0)
        kept = options.out / f"benchmark_{scheme.replace(', ', '_').replace(' ', '_')}_{size}.safetensors"      # to look at afterwards
        kept.unlink(missing_ok=True)
        network, encoder, diffusion = presets.build_networks("".join(dish_names("train")), space)
        walk, moments = train(network, diffusion, make_loader(data, batch, collate=collate), encoder, minutes=minutes, steps=10 ** 7,
                              checkpoint=kept, **presets.TRAINING), [0.5, 1.0]
        for step in tqdm(walk, desc=scheme, unit="step"):
            if step.progress >= moments[0]:
                moments.pop(0)
                speed[scheme] = step.images_per_second
                right = fidelity(reader, step.network, step.encoder, diffusion, names, size, space, at_once=50)
                rows.append({"scheme": scheme, "minutes": round(step.seconds / 60, 2), "pictures": (step.index + 1) * batch,
                             "pictures/s": step.images_per_second, "held_out_fidelity": right})
                tqdm.write(str(rows[-1]))
    disk = [{"store": name, "MB per 1,000": (options.out / f"{name}_{size}" / "data.mdb").stat().st_size / len(pictures) / 1e3}
            for name in ("dishes", "latents")]
    same = speed["pixels, the latents' network"]
    finish("latent", {"train_speedup": speed["latents, kept"] / speed["pixels"],
                      "train_speedup_same_network": speed["latents, kept"] / same, "psnr_db": back["PSNR"],
                      "reader_accuracy": back["read fully right"], "compression": back["fewer numbers"],
                      "reader_accuracy_of_real": accuracy}, rows, options.quick, autoencoder=[back], disk=disk)


if __name__ == "__main__":
    main()
