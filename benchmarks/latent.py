"""Diffusion on pixels, on stored latents, and on latents that the data loader encodes.

    python -m benchmarks.latent [--quick]

Images have 128×128 pixels. First the demo's autoencoder is trained, and its reconstructions of
held-out dishes are measured: PSNR, SSIM, sharpness, and the fraction that an attribute classifier
classifies exactly (benchmarks/autoencoder.py compares other shapes). Then the demo's network is
trained for the same time in three ways, with the same channels and the same sampler:

    pixels                       the network processes 4×4 pixels as one position
    latents, stored              latents from disk, 2×2 as one position
    latents, encoded each time   latents that the data loader encodes, 2×2 as one position

After half and after all of the training time the classifier measures the prompt accuracy of
generated held-out names.
"""

import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from datasets.dishes import dish_names
from easy_diffusion import dish_classifier, presets
from easy_diffusion.evaluation.metrics import psnr, sharpness, ssim
from easy_diffusion.latent_space import EncodingCollate
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.trainer import train

from .fidelity import check_classifier_accuracy, classify_dishes, measure_fidelity
from .report import finish, make_parser


def measure_reconstruction(
    autoencoder, measure_accuracy: Callable, images: torch.Tensor, names: list[str]
) -> dict:
    """Return a row with the quality of an autoencoder's reconstructions.

    images: uint8 [B, 3, H, W].
    measure_accuracy: (images uint8 [B, 3, H, W], names) → prompt accuracy in [0, 1].
    compression: values of an image over values of its latent.
    sharpness: of the reconstructions over that of the images.
    """
    reconstructions = presets.reconstruct(autoencoder, images)
    channels = autoencoder.settings["latent_channels"]
    relative_sharpness = sharpness(reconstructions) / sharpness(images)
    return {
        "f": autoencoder.factor,
        "channels": channels,
        "compression": 3 * autoencoder.factor**2 / channels,
        "PSNR": float(psnr(images, reconstructions).mean()),
        "SSIM": float(ssim(images, reconstructions).mean()),
        "sharpness": float(relative_sharpness.mean()),
        "prompt accuracy": measure_accuracy(reconstructions, names),
        "size": images.shape[-1],
    }


def measure_pixel_steps_per_second(store, steps: int = 8) -> float:
    """Return the median training rate, in steps per second, of the latents' network on pixels.

    The network is that of the latents, with attention at its finest level, but 4×4 pixels as one
    position.
    """
    _, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    network = UNet(
        channels=(64, 128),
        attention=(True, True),
        heads=2,
        patch=4,
        context_dim=encoder.dim,
        pooled=True,
    )
    training = train(
        network,
        diffusion,
        make_loader(store, presets.BATCH),
        encoder,
        steps=steps,
        **presets.TRAINING,
    )
    times = [step.seconds for step in training]
    durations = [end - start for start, end in zip(times[1:], times[2:])]
    return 1 / statistics.median(durations)


def main():
    options = make_parser(
        "latent", __doc__, out=Path("out"), minutes=presets.default_minutes()
    ).parse_args()
    quick = options.quick
    size = 32 if quick else 128
    minutes = 0.05 if quick else options.minutes
    name_count = 20 if quick else 100

    # Data and classifier
    dish_count = 200 if quick else presets.DISHES
    images = presets.prepare_dishes(options.out / f"dishes_{size}", dish_count, size)
    if quick:
        classifier = dish_classifier.load_or_train_classifier(size, 40, options.out, 1000)
    else:
        classifier = dish_classifier.load_or_train_classifier(size, 1300, options.out, 20_000)
    measure_accuracy = partial(classify_dishes, classifier)
    test_images, test_names = dish_classifier.draw_dishes(
        50 if quick else 500, size, "held_out", 102
    )
    accuracy = measure_accuracy(test_images, test_names)
    check_classifier_accuracy(accuracy, quick)

    # Autoencoder
    evaluate = partial(
        presets.evaluate_autoencoder, images=test_images, names=test_names,
        measure_accuracy=measure_accuracy,
    )
    latents, autoencoder = presets.prepare_latents(images, options.out, size, minutes, evaluate)
    checkpoint = load_checkpoint(options.out / f"autoencoder_{size}.training.safetensors")
    quality = measure_reconstruction(autoencoder, measure_accuracy, test_images, test_names)
    quality = {"minutes": checkpoint["seconds"] / 60} | quality
    print(quality, flush=True)

    # Three trainings: scheme → (dataset, batch size, collate function, autoencoder)
    names = random.Random(0).sample(dish_names("held_out"), name_count)
    device = next(autoencoder.parameters()).device
    encoding_collate = EncodingCollate(autoencoder, device)
    schemes = {
        "pixels": (images, presets.BATCH, None, None),
        "latents, stored": (latents, presets.LATENT_BATCH, None, autoencoder),
        "latents, encoded each time": (images, presets.LATENT_BATCH, encoding_collate, autoencoder),
    }
    rows = []
    same_network_rate = measure_pixel_steps_per_second(images) * presets.BATCH
    images_per_second = {}
    for scheme, (dataset, batch_size, collate, scheme_autoencoder) in schemes.items():
        torch.manual_seed(0)
        scheme_name = scheme.replace(", ", "_").replace(" ", "_")
        saved_run = options.out / f"benchmark_{scheme_name}_{size}.safetensors"
        saved_run.unlink(missing_ok=True)       # a run from before would be resumed
        network, encoder, diffusion = presets.build_networks(
            "".join(dish_names("train")), scheme_autoencoder
        )
        training = train(
            network,
            diffusion,
            make_loader(dataset, batch_size, collate=collate),
            encoder,
            minutes=minutes,
            steps=None,
            checkpoint=saved_run,
            **presets.TRAINING,
        )
        measure_at = [0.5, 1.0]         # progress of the training
        for step in tqdm(training, desc=scheme, unit="step"):
            if step.progress >= measure_at[0]:
                measure_at.pop(0)
                images_per_second[scheme] = step.images_per_second
                fidelity = measure_fidelity(
                    classifier, step.ema_network, step.ema_encoder, diffusion, names, size,
                    scheme_autoencoder, batch_size=50,
                )
                rows.append({
                    "scheme": scheme,
                    "minutes": round(step.seconds / 60, 2),
                    "images": (step.index + 1) * batch_size,
                    "images/s": step.images_per_second,
                    "held_out_fidelity": fidelity,
                })
                tqdm.write(str(rows[-1]))

    # Disk space
    disk = []
    for store_name in ("dishes", "latents"):
        file_bytes = (options.out / f"{store_name}_{size}" / "data.mdb").stat().st_size
        disk.append({"store": store_name, "MB per 1,000": file_bytes / len(images) / 1e3})

    latent_rate = images_per_second["latents, stored"]
    claims = {
        "train_speedup": latent_rate / images_per_second["pixels"],
        "train_speedup_same_network": latent_rate / same_network_rate,
        "psnr_db": quality["PSNR"],
        "reader_accuracy": quality["prompt accuracy"],
        "compression": quality["compression"],
        "reader_accuracy_of_real": accuracy,
    }
    finish("latent", claims, rows, quick, autoencoder=[quality], disk=disk)


if __name__ == "__main__":
    main()
