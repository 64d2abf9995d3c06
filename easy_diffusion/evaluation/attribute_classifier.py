"""A classifier that says what a drawn dish shows: its ingredients and its way of cooking.

The classifier is a small convolutional network. It is trained on real images of dishes and on the
attributes that their names state. Then it classifies samples:

    exact match       the classifier finds all ingredients of the prompt, no others, and the way of
                      cooking
    prompt accuracy   the fraction of samples that are exact matches

The prompt accuracy p of n samples has the standard error sqrt(p (1 - p) / n). It is meaningful only
if the classifier itself is accurate. Therefore classify real images first that it was not trained
on: at least 98% of them should be exact matches.

`classifier_features` returns the features before the last layer. The distances of metrics.py
compare samples with real images in this space. The file needs nothing but torch.

>>> classifier = AttributeClassifier(ingredients=["番茄", "鸡蛋"], ways=["炒", "汤"])
>>> images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
>>> [logits.shape for logits in classifier(images)]
[torch.Size([3, 2]), torch.Size([3, 2])]
>>> predictions = classifier.classify(images)
>>> classifier.exact_matches(images, predictions)
[True, True, True]
>>> prompt_accuracy([True, False, True, True])
0.75
>>> classifier_features(classifier, images).shape
torch.Size([3, 512])
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

BATCH_SIZE = 256                        # images that are classified at once


class AttributeClassifier(nn.Module):
    """A convolutional network that classifies the ingredients and the way of cooking of a dish.

    It maps images uint8 [B, 3, H, W] to logits of the ingredients [B, I], each present or not, and
    of the ways [B, W], one of which is right. H and W are 32 or more.

    ingredients, ways: the names to choose from, I and W of them.
    width: channels of the first layer, a multiple of 8; each of the four levels has twice as many.
    """

    def __init__(self, ingredients: Iterable[str], ways: Iterable[str], width: int = 32):
        super().__init__()
        self.ingredients = list(ingredients)
        self.ways = list(ways)
        layers = []
        in_channels = 3
        for level in range(4):                                  # H → H/2 → H/4 → H/8 → H/16
            channels = width * 2 ** level
            layers += [nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, channels), nn.SiLU()]
            if level:
                layers += [nn.Conv2d(channels, channels, 3, padding=1)]
                layers += [nn.GroupNorm(8, channels), nn.SiLU()]
            in_channels = channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * in_channels, len(self.ingredients) + len(self.ways))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of images uint8 [B, 3, H, W], float [B, 16 · width].

        They are the mean and the maximum over the positions of the last convolutional layer.
        """
        h = self.body(images.float() / 127.5 - 1)                           # [B, C, H/16, W/16]
        return torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)   # [B, 2C]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.features(images))                           # [B, I + W]
        return logits.split([len(self.ingredients), len(self.ways)], dim=1)

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> list[tuple[frozenset[str], str]]:
        """Return (ingredients, way) of each image uint8 [B, 3, H, W].

        An ingredient is returned if its probability is above 1/2. The module is set to eval mode.
        """
        self.eval()
        predictions = []
        for batch in images.to(self.head.weight.device).split(BATCH_SIZE):
            ingredient_logits, way_logits = self(batch)
            is_present = (ingredient_logits > 0).tolist()
            way_indices = way_logits.argmax(dim=1).tolist()
            for row, way_index in zip(is_present, way_indices):
                ingredients = frozenset(
                    name for name, present in zip(self.ingredients, row) if present
                )
                predictions.append((ingredients, self.ways[way_index]))
        return predictions

    def exact_matches(self, images: torch.Tensor, dishes) -> list[bool]:
        """Return for each image whether it shows exactly what its dish has.

        images: uint8 [B, 3, H, W].
        dishes: B pairs (ingredients, way), such as those of `attributes` in datasets/dishes.py.

        Raises ValueError if the numbers of images and dishes differ.
        """
        predictions = self.classify(images)
        if len(predictions) != len(dishes):
            raise ValueError(f"{len(predictions)} images, but {len(dishes)} dishes")
        return [
            ingredients == frozenset(dish[0]) and way == dish[1]
            for (ingredients, way), dish in zip(predictions, dishes)
        ]


def prompt_accuracy(matches: list[bool]) -> float:
    """Return the fraction p of exact matches, 0 to 1.

    Its standard error is sqrt(p (1 - p) / n) for n images. Raises ValueError for an empty list.

    matches: for each image whether it is an exact match, see `AttributeClassifier.exact_matches`.
    """
    if not matches:
        raise ValueError("the prompt accuracy of no images is undefined")
    return sum(matches) / len(matches)


def train_attribute_classifier(
    classifier: AttributeClassifier,
    loader,
    attributes: Callable,
    steps: int = 2000,
    learning_rate: float = 2e-3,
    bf16: bool = False,
) -> Iterator[float]:
    """Train a classifier and yield the loss of each step.

    The loss is the sum of the binary cross-entropies of all ingredients and the cross-entropy of
    the way of cooking. `augment` adds blur and noise to the images, so that a sample is not
    misclassified because of its texture. AdamW trains with a one-cycle learning rate.

    loader: (images uint8 [B, 3, H, W], names) batches; it is iterated over repeatedly.
    attributes: name → (ingredients, way).
    learning_rate: the peak rate.
    bf16: compute in bfloat16, which halves the time on a device that supports it.

    Raises ValueError if the loader yields no batch.
    """
    device = classifier.head.weight.device

    def compute_loss(images, names):
        # The targets: which ingredients are present, and the index of the way of cooking.
        dishes = [attributes(name) for name in names]
        is_present = torch.tensor([
            [float(ingredient in dish[0]) for ingredient in classifier.ingredients]
            for dish in dishes
        ])                                                                  # [B, I]
        way_indices = torch.tensor([classifier.ways.index(dish[1]) for dish in dishes])

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            ingredient_logits, way_logits = classifier(augment(images.to(device)))
        ingredient_losses = F.binary_cross_entropy_with_logits(
            ingredient_logits.float(), is_present.to(device), reduction="none"
        )                                                                   # [B, I]
        way_loss = F.cross_entropy(way_logits.float(), way_indices.to(device))
        return ingredient_losses.sum(dim=1).mean() + way_loss

    return train_with_loss(classifier, loader, compute_loss, steps, learning_rate)


def train_with_loss(
    network: nn.Module, loader, compute_loss: Callable, steps: int, learning_rate: float
) -> Iterator[float]:
    """Train a network and yield the loss of each step; AdamW with a one-cycle learning rate.

    loader: batches, iterated over repeatedly. compute_loss: (*batch) → the loss.
    learning_rate: the peak rate.

    Raises ValueError if the loader yields no batch.
    """
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    step = 0
    while step < steps:
        epoch_start = step
        for batch in loader:
            network.train()
            loss = compute_loss(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()
            step += 1
            if step == steps:
                return
        if step == epoch_start:
            raise ValueError("the loader yields no batch")


def augment(images: torch.Tensor) -> torch.Tensor:
    """Blur half of the images and add noise to all; float, values around 0 … 255.

    The blur is a 3×3 mean. The noise is Gaussian with a standard deviation of up to 10 grey levels,
    drawn for each image.

    images: [B, 3, H, W] with values 0 … 255.
    """
    images = images.float()
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    u = torch.rand(len(images), 1, 1, 1, device=images.device)              # uniform in [0, 1)
    images = torch.where(u < 0.5, images, blurred)
    std = 20 * (u - 0.5).abs()
    return images + torch.randn_like(images) * std


def classifier_features(classifier: AttributeClassifier, images: torch.Tensor) -> torch.Tensor:
    """Return the features of images uint8 [N, 3, H, W], float64 [N, 16 · width], on the CPU."""
    device = classifier.head.weight.device
    classifier.eval()
    with torch.no_grad():
        features = [classifier.features(batch.to(device)) for batch in images.split(BATCH_SIZE)]
    return torch.cat(features).cpu().double()
