"""The segmenter learns a layout, and mIoU equals its definition."""

import numpy as np
import pytest
import torch

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import attributes, compose
from easy_diffusion.evaluation.part_segmenter import PartSegmenter, mean_iou, train_segmenter


def test_mean_iou_is_the_mean_over_the_classes_that_occur():
    a = torch.tensor([[[0, 0, 1, 1]]])
    b = torch.tensor([[[0, 1, 1, 5]]])
    # Class 0: 1 of 2. Class 1: 1 of 3. Class 5: 0 of 1.
    expected = (1 / 2 + 1 / 3 + 0) / 3
    torch.testing.assert_close(mean_iou(a, b), torch.tensor([expected]))
    both = torch.cat([a, b])
    assert mean_iou(both, both).tolist() == [1, 1]


def test_labels_name_the_ingredients():
    segmenter = PartSegmenter(["甲", "乙", "丙"])
    parts = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    assert segmenter.labels(parts, ["丙", "甲"]).tolist() == [[0, 1], [4, 2]]
    with pytest.raises(ValueError, match="丁"):
        segmenter.labels(parts, ["丁", "甲"])


def test_it_learns_where_the_parts_are():
    """One name, so that 100 steps suffice: on new dishes more than 90% of the pixels are right."""
    torch.manual_seed(0)
    name = "番茄炒黄瓜"
    segmenter = PartSegmenter(INGREDIENTS, width=16)

    def draw(seeds):
        dishes = [compose(name, 64, seed) for seed in seeds]
        images = torch.from_numpy(np.stack([dish.image for dish in dishes]))
        parts = torch.from_numpy(np.stack([dish.parts for dish in dishes]))
        return images, segmenter.labels(parts, attributes(name).ingredients)

    images, labels = draw(range(60))
    loader = [(images[i:i + 20], labels[i:i + 20]) for i in (0, 20, 40)]
    losses = list(train_segmenter(segmenter, loader, 100, learning_rate=1e-2))
    assert losses[-1] < 0.2 * losses[0]
    images, labels = draw(range(100, 120))
    segmented = segmenter.segment(images)
    assert (segmented == labels).float().mean() > 0.9
    assert mean_iou(segmented, labels).mean() > 0.7
    with pytest.raises(ValueError, match="no batch"):
        next(train_segmenter(segmenter, [], steps=1))
