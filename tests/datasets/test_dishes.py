"""Drawn dishes: names, splits, reproducible images."""

import itertools
import pickle

import numpy as np
import pytest
import torch

import datasets
from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import (
    HELD_OUT_PAIRS,
    INGREDIENT_PAIRS,
    WAYS,
    Attributes,
    Dishes,
    attributes,
    dish_names,
    draw_dish,
)


def test_the_package_exports_what_needs_no_lmdb():
    assert set(datasets.__all__) <= set(dir(datasets))
    assert datasets.Dishes is Dishes


def test_there_are_enough_ingredients_and_ways_of_cooking():
    assert len(INGREDIENTS) >= 20
    assert len(WAYS) >= 7
    assert len({ingredient.shape for ingredient in INGREDIENTS.values()}) == len(INGREDIENTS)
    assert len({ingredient.palette for ingredient in INGREDIENTS.values()}) == len(INGREDIENTS)


@pytest.mark.parametrize(
    "name, ingredients, way",
    [
        ("番茄炒鸡蛋", {"番茄", "鸡蛋"}, "炒"),
        ("土豆牛肉汤", {"土豆", "牛肉"}, "汤"),
        ("豆腐蒸虾仁", {"豆腐", "虾仁"}, "蒸"),
        ("砂锅茄子土豆", {"茄子", "土豆"}, "砂锅"),
        ("清炒生菜", {"生菜"}, "炒"),
        ("凉拌黄瓜木耳", {"黄瓜", "木耳"}, "凉拌"),
        ("铁板豆腐", {"豆腐"}, "铁板"),
        ("牛肉面", {"牛肉"}, "面"),
        ("香菇青椒盖饭", {"香菇", "青椒"}, "盖饭"),
        ("土豆炒青椒", {"土豆", "青椒"}, "炒"),
    ],
)
def test_names_are_those_of_a_menu(name, ingredients, way):
    assert set(attributes(name).ingredients) == ingredients
    assert attributes(name).way == way


def test_every_name_means_one_dish():
    names = dish_names("train") + dish_names("held_out")
    ingredient_count = len(INGREDIENTS)
    ordered_pair_count = ingredient_count * (ingredient_count - 1)
    assert len(names) == len(WAYS) * (ingredient_count + ordered_pair_count)
    assert len(set(names)) == len(names)
    assert len({attributes(name) for name in names}) == len(names)


def test_a_tenth_of_the_pairs_is_in_no_training_dish_whatever_the_way_of_cooking():
    assert len(HELD_OUT_PAIRS) == len(INGREDIENT_PAIRS) // 10

    def pairs(split):
        sets = [frozenset(attributes(name).ingredients) for name in dish_names(split)]
        return {ingredients for ingredients in sets if len(ingredients) == 2}

    assert pairs("held_out") == {frozenset(pair) for pair in HELD_OUT_PAIRS}
    assert not pairs("train") & pairs("held_out")
    assert pairs("train") | pairs("held_out") == {frozenset(pair) for pair in INGREDIENT_PAIRS}
    in_training_pairs = set(itertools.chain(*pairs("train")))
    assert in_training_pairs == set(INGREDIENTS), "each ingredient occurs in a training pair"


def test_the_dish_of_the_demo_is_held_out():
    assert "番茄炒鸡蛋" in dish_names("held_out")


def test_the_same_name_and_seed_give_the_same_image():
    image = draw_dish("番茄炒鸡蛋", 64, seed=5)
    assert np.array_equal(image, draw_dish("番茄炒鸡蛋", 64, seed=5))
    assert not np.array_equal(image, draw_dish("番茄炒鸡蛋", 64, seed=6))
    assert not np.array_equal(image, draw_dish("番茄鸡蛋汤", 64, seed=5))


@pytest.mark.parametrize("size", [32, 48, 64, 100, 128, 129, 256, 512])
def test_every_size_shows_the_same_dish(size):
    def thumbnail(image):  # [3, 16, 16]
        return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(image).float(), 16)

    image = draw_dish("土豆炒青椒", size, seed=1)
    assert image.shape == (3, size, size)
    assert image.dtype == np.uint8
    same_seed = thumbnail(draw_dish("土豆炒青椒", 64, seed=1))
    other_seed = thumbnail(draw_dish("土豆炒青椒", 64, seed=2))
    distance = (thumbnail(image) - same_seed).abs().mean()
    assert distance < 0.35 * (thumbnail(image) - other_seed).abs().mean()


def test_every_dish_can_be_drawn_with_contrast_and_highlights():
    for name in dish_names("train")[::37] + dish_names("held_out")[::17]:
        image = draw_dish(name, 64, seed=0)
        assert image.std() > 25, name
        assert image.max() > 180, name


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attributes("宫保鸡丁"), "宫保鸡丁"),
        (lambda: draw_dish("番茄炒番茄"), "番茄炒番茄"),
        (lambda: draw_dish("番茄汤", 16), "16"),
        (lambda: draw_dish("番茄汤", 513), "513"),
        (lambda: dish_names("test"), "test"),
        (lambda: Dishes(3)[3], "3"),
    ],
)
def test_errors_name_what_cannot_be_drawn(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call()


def test_the_dataset_is_reproducible_in_every_worker():
    dishes = Dishes(length=40, size=32, seed=3)
    assert pickle.loads(pickle.dumps(dishes))[7][1] == dishes[7][1]
    loader = torch.utils.data.DataLoader(dishes, batch_size=10, num_workers=2)
    images, names = [], []
    for image_batch, name_batch in loader:
        images.append(image_batch)
        names += name_batch
    assert names == [dishes[i][1] for i in range(40)]
    assert torch.equal(torch.cat(images)[7], dishes[7][0])
    assert dishes[0][0].dtype == torch.uint8
    assert dishes[0][0].shape == (3, 32, 32)


def test_each_split_draws_from_its_own_names():
    train_names = set(dish_names("train"))
    held_out_names = set(dish_names("held_out"))
    train_dishes = Dishes(400, 32)
    names = [train_dishes[i][1] for i in range(400)]
    assert set(names) <= train_names
    one_ingredient = sum(len(attributes(name).ingredients) == 1 for name in names)
    assert 0.15 < one_ingredient / 400 < 0.35  # the expected value is 0.125; here it is 0.1525
    held_out_dishes = Dishes(50, 32, "held_out")
    assert {held_out_dishes[i][1] for i in range(50)} <= held_out_names
    assert isinstance(attributes(names[0]), Attributes)
