import pytest
import torch

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, Dishes, attributes
from easy_diffusion.metrics import Reader, blurred, share, train_reader


def test_fully_right_means_all_ingredients_no_others_and_the_way():
    reader = Reader(["番茄", "鸡蛋"], ["炒", "汤"])
    seen = [(frozenset({"番茄", "鸡蛋"}), "炒")] * 2 + [(frozenset({"番茄"}), "炒"), (frozenset({"番茄", "鸡蛋"}), "汤")]
    reader.read = lambda pictures: seen
    dishes = [(("鸡蛋", "番茄"), "炒"), (("番茄",), "炒"), (("番茄", "鸡蛋"), "炒"), (("番茄", "鸡蛋"), "炒")]
    right = reader.fully_right(torch.zeros(4), dishes)
    assert right == [True, False, False, False] and share(right) == 0.25
    with pytest.raises(ValueError, match="4 pictures, but 1"):
        reader.fully_right(torch.zeros(4), dishes[:1])


def test_it_learns_to_read():
    """Five ingredients and three ways in 120 steps; a guess would be right once in 45 times."""
    torch.manual_seed(0)
    few = [d for d in Dishes(6000, 32) if set(attributes(d[1]).ingredients) <= {"番茄", "生菜", "木耳", "豆腐", "胡萝卜"}
           and attributes(d[1]).way in ("炒", "砂锅", "面")]
    learn, test = few[:-40], few[-40:]
    reader = Reader(INGREDIENTS, WAYS, width=16)
    losses = list(train_reader(reader, torch.utils.data.DataLoader(learn, 32, shuffle=True), attributes, steps=120, learning_rate=4e-3))
    assert len(losses) == 120 and losses[-1] < losses[0] / 4
    right = reader.fully_right(torch.stack([p for p, _ in test]), [attributes(n) for _, n in test])
    assert share(right) > 0.5


def test_blurring_keeps_the_picture_recognisable():
    pictures = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    out = blurred(pictures)
    assert out.shape == pictures.shape and 0.1 < (out - 128).abs().mean() < 10
    stripes = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 255
    contrast = blurred(stripes).std(dim=(1, 2, 3))
    assert 0.2 < (contrast < 80).float().mean() < 0.8                       # about half lose their stripes, half keep them
