"""The attribute classifier of drawn dishes: its training images, its training, its file.

The classifier measures the prompt accuracy of generated dishes. Its network and the definition of
prompt accuracy are in evaluation/attribute_classifier.py. The benchmarks and the notebooks call

    draw_dishes                draw dishes of one split with their names, all in memory
    load_or_train_classifier   load the classifier for dishes of one size, or train and save it
    cached_classifier          the same for other training images, such as views of a camera

The training takes minutes. An interrupted training starts again.

>>> images, names = draw_dishes(4, size=32, split="held_out", seed=102)
>>> tuple(images.shape), images.dtype, len(names)
((4, 3, 32, 32), torch.uint8, 4)
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, Dishes, attributes

from .evaluation.attribute_classifier import AttributeClassifier, train_attribute_classifier
from .networks.weights_io import load_weights
from .training.checkpoint import load_checkpoint, save_checkpoint
from .training.distributed import fast_precision


def draw_dishes(
    count: int, size: int, split: str = "train", seed: int = 0
) -> tuple[torch.Tensor, list[str]]:
    """Draw `count` dishes: (images uint8 [count, 3, size, size], names).

    split: "train" or "held_out"; the ingredient pairs of the second occur in no training dish.
    """
    return load_whole_dataset(Dishes(count, size, split, seed))


def load_whole_dataset(dataset) -> tuple[torch.Tensor, list[str]]:
    """Load all items of a dataset of (image, caption): (images uint8 [N, 3, H, W], captions)."""
    workers = min(8, os.cpu_count() or 1)
    batches = list(torch.utils.data.DataLoader(dataset, 100, num_workers=workers))
    images = torch.cat([images for images, _ in batches])
    captions = [caption for _, captions in batches for caption in captions]
    return images, captions


def load_or_train_classifier(
    size: int, steps: int, out: Path, count: int = 34_700
) -> AttributeClassifier:
    """Load the attribute classifier for dishes of this size from `out`, or train it.

    steps, count: of its training, in steps and in drawn dishes.

    It is trained on the dishes of both splits, because it must recognise held-out dishes, too.
    Every pair of ingredients is equally frequent, so that the classifier prefers none.
    """
    def draw_training_dishes():
        held_out_count = count * 27 // 347
        train_images, train_names = draw_dishes(count - held_out_count, size, "train", seed=100)
        held_out_images, held_out_names = draw_dishes(held_out_count, size, "held_out", seed=101)
        return torch.cat([train_images, held_out_images]), train_names + held_out_names

    path = out / f"classifier_{size}_{steps}.safetensors"
    return cached_classifier(path, steps, draw_training_dishes)


def cached_classifier(path: Path, steps: int, make_examples: Callable) -> AttributeClassifier:
    """Load the attribute classifier that is saved as `path`; if there is none, train and save it.

    make_examples: () → (images uint8 [N, 3, H, W], names); called only for training.
    """
    torch.manual_seed(0)
    classifier = AttributeClassifier(INGREDIENTS, WAYS)
    for existing in (path, old_path(path)):
        if existing.exists():
            load_weights(classifier, load_checkpoint(existing))
            return classifier
    images, names = make_examples()
    loader = torch.utils.data.DataLoader(
        list(zip(images, names)), batch_size=64, shuffle=True, drop_last=True
    )
    losses = train_attribute_classifier(
        classifier, loader, attributes, steps, bf16=fast_precision() == "bf16"
    )
    for _ in tqdm(losses, total=steps, desc="training the attribute classifier"):
        pass
    save_checkpoint(path, classifier.state_dict())
    return classifier


def old_path(path: Path) -> Path:
    """Where version 1 saved the classifier that is now saved as `path`."""
    name = path.name.replace("view_classifier_", "reader_of_frames_")
    return path.with_name(name.replace("classifier_", "reader_"))
