"""Fidelity over training minutes, at the demo's settings: python -m benchmarks.fidelity [--quick]

A reader is trained on drawings of all names, and must read new drawings of held-out names fully right in 98 of 100. Then the
demo's network is trained on the training names alone; after half and after all of its time it draws held-out and
trained names with its own sampler, and the reader reads them.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from tqdm.auto import tqdm

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, Dishes, attributes, dish_names
from easy_diffusion import generate, presets
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier, prompt_accuracy, train_attribute_classifier
from easy_diffusion.networks import weights_io
from easy_diffusion.training import checkpoint
from easy_diffusion.training.distributed import fast_precision

from .report import finish

LEAST_READER_ACCURACY = 0.98


def drawings(count, size, split, seed):
    """(pictures uint8 [count, 3, size, size], names)"""
    return all_of(Dishes(count, size, split, seed))


def all_of(dataset):
    """(pictures uint8 [N, 3, H, W], names) of a dataset whose items have to be drawn."""
    pictures, names = zip(*torch.utils.data.DataLoader(dataset, 100, num_workers=2))
    return torch.cat(pictures), [name for some in names for name in some]


def kept_reader(path: Path, steps: int, drawn: Callable) -> AttributeClassifier:
    """The reader in a file, trained first, if it is not there yet, on what drawn() gives: (pictures, names)."""
    torch.manual_seed(0)
    reader = AttributeClassifier(INGREDIENTS, WAYS)
    if path.exists():
        weights_io.load_weights(reader, checkpoint.load_checkpoint(path))
        return reader
    loader = torch.utils.data.DataLoader(list(zip(*drawn())), 64, shuffle=True, drop_last=True)
    losses = train_attribute_classifier(reader, loader, attributes, steps, bf16=fast_precision() == "bf16")
    for _ in tqdm(losses, total=steps, desc="training the reader"):
        pass
    checkpoint.save_checkpoint(path, reader.state_dict())
    return reader


def trained_reader(size: int, steps: int, out: Path, count: int = 34_700) -> AttributeClassifier:
    """A reader of `count` pictures of this size; kept in `out`, because it only depends on the drawings."""
    def drawn():
        # All pairs, each as often as any other, so that the reader expects none more than another; other seeds than the test's.
        held_out = count * 27 // 347
        (a, names_a), (b, names_b) = drawings(count - held_out, size, "train", 100), drawings(held_out, size, "held_out", 101)
        return torch.cat([a, b]), names_a + names_b

    return kept_reader(out / f"reader_{size}_{steps}.safetensors", steps, drawn)


def fidelity(reader, network, encoder, diffusion, names, size, autoencoder=None, at_once=100):
    """The share of names whose sample is read fully right; `at_once` are drawn, and read, at a time."""
    right = []
    for start in range(0, len(names), at_once):
        some = names[start:start + at_once]
        pictures = torch.from_numpy(generate.generate_images(network, encoder, diffusion, some, size, seed=start, autoencoder=autoencoder))
        right += reader.exact_matches(pictures.permute(0, 3, 1, 2), [attributes(name) for name in some])
    return prompt_accuracy(right)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds of everything; the figures are not kept")
    parser.add_argument("--minutes", type=float, default=2.5 if torch.cuda.is_available() else 10.0, help="of training")
    parser.add_argument("--size", type=int, default=presets.SIZE, help="side of the pictures")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the drawn dishes and the reader are kept")
    parser.add_argument("--checkpoint", type=Path, help="measure this training, one of the demo's, instead of a new one")
    options = parser.parse_args()
    size, minutes, count = options.size, (0.2 if options.quick else options.minutes), (20 if options.quick else 300)
    store = presets.prepare_dishes(options.out / f"dishes_{size}", 2000 if options.quick else presets.DISHES, size)
    reader = trained_reader(size, 40, options.out, 1000) if options.quick else trained_reader(size, 2600, options.out)
    pictures, names = drawings(200 if options.quick else 2000, size, "held_out", 102)
    accuracy = prompt_accuracy(reader.exact_matches(pictures, [attributes(name) for name in names]))
    print(f"the reader reads {accuracy:.1%} of {len(names)} held-out drawings fully right")
    if accuracy < LEAST_READER_ACCURACY and not options.quick:
        raise SystemExit(f"below {LEAST_READER_ACCURACY:.0%} it measures nothing")

    names = {split: random.Random(0).sample(dish_names(split), count) for split in ("held_out", "train")}
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    rows = []

    def measure(network, encoder, seconds, steps, loss):
        rows.append({"minutes": round(seconds / 60, 2), "pictures": steps * presets.BATCH, "loss": loss} | {
            f"{split}_fidelity": fidelity(reader, network, encoder, diffusion, names[split], size) for split in names})
        tqdm.write(str(rows[-1]))

    if options.checkpoint:
        saved = checkpoint.load_checkpoint(options.checkpoint)
        weights_io.load_weights(torch.nn.ModuleDict({"network": network, "encoder": encoder}).eval(), saved["average"])
        measure(network, encoder, saved["seconds"], saved["index"], fmean(saved["losses"][-100:]))
    else:
        moments = [0.5, 1.0]
        bar = tqdm(presets.train_demo(network, encoder, diffusion, store, None, minutes), desc="training", unit="step")
        for step in bar:
            bar.set_postfix_str(f"loss {step.smooth_loss:.4f}, {step.images_per_second:.0f} pictures/s, {step.progress:.0%}",
                                refresh=False)
            if step.progress >= moments[0]:
                moments.pop(0)
                measure(step.network, step.encoder, step.seconds, step.index + 1, step.smooth_loss)
    last = rows[-1]
    finish("fidelity", {"held_out_fidelity": last["held_out_fidelity"], "trained_fidelity": last["train_fidelity"],
                        "minutes": last["minutes"], "size": size, "reader_accuracy": accuracy}, rows, options.quick)


if __name__ == "__main__":
    main()
