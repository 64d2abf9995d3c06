"""A network that says for each pixel what it shows: does a sample keep to a given layout?

The classes are the parts of a drawn dish: the tabletop, the vessel and each ingredient. The layout
of a sample is compared with the wanted one by the mean intersection over union of the classes that
occur in either (mIoU; Long et al., "Fully Convolutional Networks for Semantic Segmentation", 2015,
section 5):

    IoU of a class = pixels of this class in both / pixels of this class in at least one

The network is a small U-Net without time and context, at half the resolution: its last layer gives
the classes of 2 × 2 pixels at once. The file needs torch and, beside it,
attribute_classifier.py.

>>> segmenter = PartSegmenter(["番茄", "鸡蛋"])
>>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
>>> labels = segmenter.segment(images)
>>> labels.shape, float(mean_iou(labels, labels)[0])
(torch.Size([2, 32, 32]), 1.0)
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .attribute_classifier import augment, train_with_loss

BATCH_SIZE = 50                         # images that are segmented at once
TABLETOP, VESSEL, FIRST_INGREDIENT = 0, 1, 2


class PartSegmenter(nn.Module):
    """Images uint8 [B, 3, H, W] → logits [B, 2 + I, H, W] of the tabletop, vessel, I ingredients.

    H and W are multiples of 16. ingredients: their names.
    """

    def __init__(self, ingredients: Iterable[str], width: int = 48):
        super().__init__()
        self.ingredients = list(ingredients)
        widths = [width, 2 * width, 3 * width, 4 * width]
        self.conv_in = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.down = nn.ModuleList(
            make_layer(a, b, stride=2) for a, b in zip(widths, widths[1:])
        )
        self.up = nn.ModuleList(
            make_layer(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1])
        )
        self.head = nn.Conv2d(width, 4 * (FIRST_INGREDIENT + len(self.ingredients)), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(images.float() / 127.5 - 1)
        skips = []
        for layer in self.down:
            skips.append(h)
            h = layer(h)
        for layer in self.up:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = layer(torch.cat([h, skips.pop()], dim=1))
        return F.pixel_shuffle(self.head(h), 2)

    @torch.no_grad()
    def segment(self, images: torch.Tensor) -> torch.Tensor:
        """Return the class of each pixel of images uint8 [N, 3, H, W], int64 [N, H, W]."""
        self.eval()
        device = self.head.weight.device
        batches = [self(batch.to(device)).argmax(dim=1) for batch in images.split(BATCH_SIZE)]
        return torch.cat(batches).cpu()

    def labels(self, parts: torch.Tensor, ingredients: Iterable[str]) -> torch.Tensor:
        """Return the class of each pixel of a map of parts uint8 [H, W], int64 [H, W].

        parts: 0 tabletop, 1 vessel, 2 and 3 the first and the second of the ingredients.
        """
        classes = [TABLETOP, VESSEL]
        classes += [FIRST_INGREDIENT + self.ingredients.index(name) for name in ingredients]
        return torch.tensor(classes)[parts.long()]


def make_layer(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
    """A 3×3 convolution, group normalisation and SiLU, twice."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.GroupNorm(8, c_out), nn.SiLU(),
        nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU(),
    )


def mean_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean IoU of the classes that occur in a or b, for each of N label maps: [N].

    a, b: int64 [N, H, W].
    """
    values = []
    for x, y in zip(a, b):
        ious = [
            ((x == label) & (y == label)).sum() / ((x == label) | (y == label)).sum()
            for label in torch.cat([x, y]).unique()
        ]
        values.append(torch.stack(ious).mean())
    return torch.stack(values)


def train_segmenter(
    segmenter: PartSegmenter, loader, steps: int = 2000, learning_rate: float = 2e-3
) -> Iterator[float]:
    """Train a segmenter and yield the loss of each step, the mean cross-entropy of the pixels.

    `augment` adds blur and noise to the images, so that a sample is not segmented wrongly because
    of its texture. AdamW trains with a one-cycle learning rate.

    loader: (images uint8 [B, 3, H, W], labels int64 [B, H, W]) batches; iterated over repeatedly.
    learning_rate: the peak rate.

    Raises ValueError if the loader yields no batch.
    """
    device = segmenter.head.weight.device

    def compute_loss(images, labels):
        return F.cross_entropy(segmenter(augment(images.to(device))), labels.to(device))

    return train_with_loss(segmenter, loader, compute_loss, steps, learning_rate)
