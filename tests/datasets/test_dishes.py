import itertools
import pickle

import numpy as np
import pytest
import torch

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import HELD_OUT_PAIRS, PAIRS, WAYS, Attributes, Dishes, attributes, dish_names, draw_dish


def test_there_is_enough_to_cook():
    assert len(INGREDIENTS) >= 20 and len(WAYS) >= 7
    assert len({ingredient.shape for ingredient in INGREDIENTS.values()}) == len(INGREDIENTS)
    assert len({ingredient.palette for ingredient in INGREDIENTS.values()}) == len(INGREDIENTS)


@pytest.mark.parametrize("name, ingredients, way", [
    ("番茄炒鸡蛋", {"番茄", "鸡蛋"}, "炒"), ("土豆牛肉汤", {"土豆", "牛肉"}, "汤"), ("豆腐蒸虾仁", {"豆腐", "虾仁"}, "蒸"),
    ("砂锅茄子土豆", {"茄子", "土豆"}, "砂锅"), ("清炒生菜", {"生菜"}, "炒"), ("凉拌黄瓜木耳", {"黄瓜", "木耳"}, "凉拌"),
    ("铁板豆腐", {"豆腐"}, "铁板"), ("牛肉面", {"牛肉"}, "面"), ("香菇青椒盖饭", {"香菇", "青椒"}, "盖饭"),
    ("土豆炒青椒", {"土豆", "青椒"}, "炒"),
])
def test_names_as_a_menu_writes_them(name, ingredients, way):
    assert set(attributes(name).ingredients) == ingredients and attributes(name).way == way


def test_every_name_means_one_dish():
    names = dish_names("train") + dish_names("held_out")
    assert len(set(names)) == len(names) == len(WAYS) * (len(INGREDIENTS) + len(INGREDIENTS) * (len(INGREDIENTS) - 1))
    assert len({attributes(name) for name in names}) == len(names)


def test_a_tenth_of_the_pairs_is_in_no_training_dish_of_any_kind():
    assert len(HELD_OUT_PAIRS) == len(PAIRS) // 10
    def pairs(split):
        return {frozenset(attributes(n).ingredients) for n in dish_names(split) if len(attributes(n).ingredients) == 2}
    assert pairs("held_out") == {frozenset(pair) for pair in HELD_OUT_PAIRS}
    assert not pairs("train") & pairs("held_out")
    assert pairs("train") | pairs("held_out") == {frozenset(pair) for pair in PAIRS}
    seen = set(itertools.chain(*pairs("train")))
    assert seen == set(INGREDIENTS), "each held-out ingredient is known from other pairs"


def test_the_demo_cooks_what_it_has_never_seen():
    assert "番茄炒鸡蛋" in dish_names("held_out")


def test_the_same_name_and_seed_give_the_same_picture():
    a, b = draw_dish("番茄炒鸡蛋", 64, seed=5), draw_dish("番茄炒鸡蛋", 64, seed=5)
    assert np.array_equal(a, b) and not np.array_equal(a, draw_dish("番茄炒鸡蛋", 64, seed=6))
    assert not np.array_equal(a, draw_dish("番茄鸡蛋汤", 64, seed=5))


@pytest.mark.parametrize("size", [32, 48, 64, 100, 128, 129, 256, 512])
def test_every_size_shows_the_same_dish(size):
    picture = draw_dish("土豆炒青椒", size, seed=1)
    assert picture.shape == (3, size, size) and picture.dtype == np.uint8
    small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(picture).float(), 16)
    same = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(draw_dish("土豆炒青椒", 64, seed=1)).float(), 16)
    other = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(draw_dish("土豆炒青椒", 64, seed=2)).float(), 16)
    assert (small - same).abs().mean() < 0.35 * (small - other).abs().mean()


def test_every_dish_can_be_drawn_and_uses_the_light():
    for name in dish_names("train")[::37] + dish_names("held_out")[::17]:
        picture = draw_dish(name, 64, seed=0)
        assert picture.std() > 25 and picture.max() > 180, name


@pytest.mark.parametrize("call, says", [
    (lambda: attributes("宫保鸡丁"), "宫保鸡丁"), (lambda: draw_dish("番茄炒番茄"), "番茄炒番茄"), (lambda: draw_dish("番茄汤", 16), "16"),
    (lambda: draw_dish("番茄汤", 513), "513"), (lambda: dish_names("test"), "test"), (lambda: Dishes(3)[3], "3"),
])
def test_what_cannot_be_drawn_is_named(call, says):
    with pytest.raises((ValueError, IndexError), match=says):
        call()


def test_the_dataset_is_reproducible_in_every_worker():
    dishes = Dishes(length=40, size=32, seed=3)
    assert pickle.loads(pickle.dumps(dishes))[7][1] == dishes[7][1]
    loader = torch.utils.data.DataLoader(dishes, batch_size=10, num_workers=2)
    pictures, names = zip(*[(p, list(n)) for p, n in loader])
    assert sum(names, []) == [dishes[i][1] for i in range(40)]
    assert torch.equal(torch.cat(pictures)[7], dishes[7][0])
    assert dishes[0][0].dtype == torch.uint8 and dishes[0][0].shape == (3, 32, 32)


def test_splits_draw_from_their_own_names():
    train, held_out = set(dish_names("train")), set(dish_names("held_out"))
    names = [Dishes(400, 32)[i][1] for i in range(400)]
    assert set(names) <= train
    assert 0.15 < sum(len(attributes(name).ingredients) == 1 for name in names) / 400 < 0.35
    assert {Dishes(50, 32, "held_out")[i][1] for i in range(50)} <= held_out
    assert isinstance(attributes(names[0]), Attributes)
