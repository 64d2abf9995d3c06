"""Seconds of the demo and of the page, and the quality of the weights in weights/.

    python -m benchmarks.demo [--quick]

First table: seconds from the start of a command to its end, with everything that it imports and
loads. For the page it is the time until it responds. The first demo makes 番茄炒鸡蛋 and a film in
which the camera circles, the second 土豆牛肉汤 and a film in which it moves to the right.

Second table: prompt accuracy. An attribute classifier finds the ingredients and the way of cooking
in one generated image per name. The baselines are drawn dishes of held-out names, and drawn dishes
that the autoencoder has reconstructed.
"""

import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path

from datasets.dishes import dish_names
from easy_diffusion import dish_classifier
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier
from easy_diffusion.pretrained import WEIGHTS, find_sizes, load_model

from .fidelity import check_classifier_accuracy, classify_dishes, measure_fidelity
from .latent import measure_reconstruction
from .report import finish, make_parser

COMMANDS = {
    "make demo": ["番茄炒鸡蛋", "--move", "circle"],
    "make demo NAME=土豆牛肉汤 MOVE=right": ["土豆牛肉汤", "--move", "right"],
}


def measure_seconds() -> list[dict]:
    """Return a row per command: its seconds from start to end, and the page's until it responds."""
    rows = []
    with tempfile.TemporaryDirectory() as out:
        for command, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "easy_diffusion.demo", *arguments, "--out", out], check=True
            )
            rows.append({"command": command, "seconds": time.perf_counter() - start})
    return [*rows, {"command": "make app", "seconds": measure_page_start()}]


def measure_page_start() -> float:
    """Start the page in another process; return the seconds until it responds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "easy_diffusion.app", "--port", str(port)])
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
                return time.perf_counter() - start
            except OSError:
                time.sleep(0.1)
        raise SystemExit("the page did not start; it needs gradio: make app installs it")
    finally:
        process.kill()
        process.wait()


def load_classifier(size: int, out: Path, quick: bool) -> AttributeClassifier:
    """Load the attribute classifier for images of this size, or train it."""
    if quick:
        return dish_classifier.load_or_train_classifier(size, 40, out, 1000)
    if size > 64:
        return dish_classifier.load_or_train_classifier(size, 1300, out, 20_000)
    return dish_classifier.load_or_train_classifier(size, 2600, out)


def measure_model(size: int, out: Path, quick: bool, count: int) -> tuple[dict, dict]:
    """Return a row with the accuracies of a model, and one of its autoencoder, {} if it has none.

    count: names of each split, and drawn dishes to reconstruct.
    """
    classifier = load_classifier(size, out, quick)
    real_images, real_names = dish_classifier.draw_dishes(500, size, "held_out", 102)
    real_accuracy = classify_dishes(classifier, real_images, real_names)
    check_classifier_accuracy(real_accuracy, quick)
    *model, autoencoder = load_model(size=size)
    row = {"size": size, "drawn held-out": real_accuracy}
    for split, column in (("held_out", "generated held-out"), ("train", "generated trained")):
        names = random.Random(0).sample(dish_names(split), count)
        row[column] = measure_fidelity(
            classifier, *model, names, size, autoencoder, batch_size=50
        )
    print(row, flush=True)
    if autoencoder is None:
        return row, {}
    measure_accuracy = partial(classify_dishes, classifier)
    return row, measure_reconstruction(
        autoencoder, measure_accuracy, real_images[:count], real_names[:count]
    )


def main():
    options = make_parser("demo", __doc__, out=Path("out")).parse_args()
    seconds = measure_seconds()
    rows = []
    reconstruction = {}
    for size in find_sizes(WEIGHTS):
        row, reconstruction = measure_model(
            size, options.out, options.quick, 10 if options.quick else 300
        )
        rows.append(row)
    weight_bytes = sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors"))
    claims = {
        "seconds_first_demo": seconds[0]["seconds"],
        "seconds_second_demo": seconds[1]["seconds"],
        "seconds_app": seconds[2]["seconds"],
        "prompt_accuracy_128": rows[-1]["generated held-out"],
        "psnr_db": reconstruction["PSNR"],
        "reconstruction_accuracy": reconstruction["prompt accuracy"],
        "weights_mb": weight_bytes / 1e6,
    }
    finish(
        "demo", claims, seconds, options.quick, accuracy=rows, reconstruction=[reconstruction]
    )


if __name__ == "__main__":
    main()
