"""Prompt accuracy over training time, with the demo's presets.

    python -m benchmarks.fidelity [--quick]

An attribute classifier is trained on drawn dishes of all names. It must classify at least 98 of 100
new drawn dishes with held-out names exactly. Then the demo's network is trained on the training
names alone. After half and after all of the training time it generates held-out and training
names with the demo's sampler. The fidelity is the fraction of these images in which the
classifier finds exactly the ingredients and the way of cooking that the name says.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean

import torch
from tqdm.auto import tqdm

from datasets.dishes import attributes, dish_names
from easy_diffusion import dish_classifier, generate, presets
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier, prompt_accuracy
from easy_diffusion.training.checkpoint import load_checkpoint, load_ema_weights

from .report import finish, make_parser

MIN_CLASSIFIER_ACCURACY = 0.98


def classify_dishes(
    classifier: AttributeClassifier, images: torch.Tensor, names: list[str]
) -> float:
    """Return the fraction of images uint8 [N, 3, H, W] that are classified exactly as named."""
    matches = []
    for start in range(0, len(names), 100):         # 100 at a time, to save memory
        batch = slice(start, start + 100)
        dishes = [attributes(name) for name in names[batch]]
        matches += classifier.exact_matches(images[batch], dishes)
    return prompt_accuracy(matches)


def check_classifier_accuracy(accuracy: float, quick: bool) -> None:
    """Print the classifier's accuracy on held-out drawn dishes; exit if it is too low to measure.

    A quick run continues with any accuracy.
    """
    print(f"the classifier classifies {accuracy:.1%} of held-out drawn dishes exactly", flush=True)
    if accuracy < MIN_CLASSIFIER_ACCURACY and not quick:
        raise SystemExit(
            f"an accuracy below {MIN_CLASSIFIER_ACCURACY:.0%} is too low to measure samples with"
        )


def load_checked_classifier(
    size: int, out: Path, quick: bool, count: int, steps: int = 2800
) -> tuple[AttributeClassifier, float]:
    """Load the attribute classifier from `out`, or train it: (it, its accuracy, checked).

    count: held-out drawn dishes that it is checked with.
    steps: of its training; a quick run takes 40.
    """
    training = (40, out, 1000) if quick else (steps, out)
    classifier = dish_classifier.load_or_train_classifier(size, *training)
    images, names = dish_classifier.draw_dishes(count, size, "held_out", 102)
    accuracy = classify_dishes(classifier, images, names)
    check_classifier_accuracy(accuracy, quick)
    return classifier, accuracy


def measure_fidelity(
    classifier: AttributeClassifier,
    network,
    encoder,
    diffusion,
    names: list[str],
    size: int,
    autoencoder=None,
    batch_size: int = 100,
) -> float:
    """Return the prompt accuracy of one generated image per name, in [0, 1].

    size: height and width of the images in pixels. batch_size: images generated at a time.
    """
    matches = []
    for start in range(0, len(names), batch_size):
        batch_names = names[start:start + batch_size]
        images = generate.generate_images(
            network, encoder, diffusion, batch_names, size, seed=start, autoencoder=autoencoder
        )
        images = torch.from_numpy(images).permute(0, 3, 1, 2)       # [B, 3, H, W]
        dishes = [attributes(name) for name in batch_names]
        matches += classifier.exact_matches(images, dishes)
    return prompt_accuracy(matches)


def parse_options() -> argparse.Namespace:
    parser = make_parser(
        "fidelity", __doc__, out=Path("out"), minutes=presets.default_minutes()
    )
    parser.add_argument(
        "--size", type=int, default=presets.SIZE,
        help="height and width of the images in pixels",
    )
    parser.add_argument(
        "--checkpoint", type=Path,
        help="checkpoint of the demo to measure instead of training a new network",
    )
    return parser.parse_args()


def main():
    options = parse_options()
    quick = options.quick
    size = options.size
    minutes = 0.2 if quick else options.minutes
    name_count = 20 if quick else 300

    # Data and classifier
    dish_count = 2000 if quick else presets.DISHES
    store = presets.prepare_dishes(options.out / f"dishes_{size}", dish_count, size)
    classifier, accuracy = load_checked_classifier(
        size, options.out, quick, 200 if quick else 2000, steps=2600
    )

    # Diffusion network
    names = {
        split: random.Random(0).sample(dish_names(split), name_count)
        for split in ("held_out", "train")
    }
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    rows = []

    def measure(network, encoder, seconds, steps, batch_size, loss):
        row = {"minutes": round(seconds / 60, 2), "images": steps * batch_size, "loss": loss}
        for split in names:
            row[f"{split}_fidelity"] = measure_fidelity(
                classifier, network, encoder, diffusion, names[split], size
            )
        rows.append(row)
        tqdm.write(str(row))

    if options.checkpoint:
        saved = load_checkpoint(options.checkpoint)
        load_ema_weights(network, encoder, diffusion, saved)
        loss = fmean(saved["losses"][-100:])
        measure(
            network, encoder, saved["seconds"], saved["index"], saved["images_per_step"], loss
        )
    else:
        measure_at = [0.5, 1.0]         # progress of the training
        batch_size = min(presets.default_batch_size(latent=False), len(store))
        training = presets.train_demo(
            network, encoder, diffusion, store, None, minutes, batch_size
        )
        progress_bar = tqdm(training, desc="training", unit="step")
        for step in progress_bar:
            progress_bar.set_postfix_str(
                f"loss {step.smooth_loss:.4f}, {step.images_per_second:.0f} images/s, "
                f"{step.progress:.0%}",
                refresh=False,
            )
            if step.progress >= measure_at[0]:
                measure_at.pop(0)
                measure(
                    step.ema_network, step.ema_encoder, step.seconds, step.index + 1, batch_size,
                    step.smooth_loss,
                )

    last = rows[-1]
    claims = {
        "held_out_fidelity": last["held_out_fidelity"],
        "trained_fidelity": last["train_fidelity"],
        "minutes": last["minutes"],
        "size": size,
        "reader_accuracy": accuracy,
    }
    finish("fidelity", claims, rows, quick)


if __name__ == "__main__":
    main()
