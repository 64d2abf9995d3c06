"""Synthetic images of dishes with Chinese names: unlimited, reproducible, nothing to download.

A dish has a way of cooking and one or two ingredients, and its name is what a menu would say:

    番茄炒鸡蛋      tomato, stir-fried with egg
    土豆牛肉汤      potato and beef soup
    豆腐蒸虾仁      tofu, steamed with shrimps
    清炒生菜        stir-fried lettuce

The scene is seen from above. It is composited from sprites, which are small images with
transparency: a tabletop, a vessel and pieces of the ingredients (dish_rendering.py). Then it is
shaded with one light from the upper left (dish_scene.py).

A tenth of the pairs of ingredients is held out: these two ingredients are never combined in a
training dish, whatever the way of cooking. A held-out name asks a model for a combination that it
has never seen.

The file needs numpy and torch and, beside it, dish_scene.py, dish_rendering.py and dish_shapes.py.

>>> image, name = Dishes(length=1000, size=64)[0]
>>> tuple(image.shape), attributes("番茄炒鸡蛋")
((3, 64, 64), Attributes(ingredients=('番茄', '鸡蛋'), way='炒'))
"""

import difflib
import itertools
import random
import zlib
from typing import NamedTuple

import numpy as np
import torch

from .dish_scene import WAYS, Composition, Scene, choose_scene, render_scene
from .dish_shapes import INGREDIENTS


class Attributes(NamedTuple):
    """What the image of a dish must show: one or two ingredients, and the way of cooking."""

    ingredients: tuple[str, ...]
    way: str


INGREDIENT_PAIRS = tuple(itertools.combinations(INGREDIENTS, 2))
HELD_OUT_PAIRS = frozenset(random.Random(1).sample(INGREDIENT_PAIRS, len(INGREDIENT_PAIRS) // 10))


# ---------------------------------------------------------------------------------------- names


def _all_dishes():
    """Yield (name, attributes) of every dish; a pair has a name for each order."""
    for way, settings in WAYS.items():
        for ingredient in INGREDIENTS:
            yield settings.name_with_one.format(ingredient), Attributes((ingredient,), way)
        for pair in itertools.permutations(INGREDIENTS, 2):
            yield settings.name_with_two.format(*pair), Attributes(pair, way)


_DISHES = dict(_all_dishes())


def attributes(name: str) -> Attributes:
    """Return what the image of the dish `name` must show.

    Raises ValueError, with the most similar names, if there is no such dish.
    """
    if name not in _DISHES:
        similar = "、".join(difflib.get_close_matches(name, _DISHES, 3, 0.3)) or "番茄炒鸡蛋"
        raise ValueError(
            f"{name!r} is not a dish that can be drawn. Similar names: {similar}. "
            f"Ingredients: {'、'.join(INGREDIENTS)}. Ways of cooking: {'、'.join(WAYS)}."
        )
    return _DISHES[name]


def dish_names(split: str = "train") -> list[str]:
    """Return all dish names of a split, "train" or "held_out".

    A pair of ingredients has two names for each way of cooking, one per order.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split is "train" or "held_out", not {split!r}')
    names = []
    for name, (ingredients, _) in _DISHES.items():
        held_out = ingredients in HELD_OUT_PAIRS or ingredients[::-1] in HELD_OUT_PAIRS
        if held_out == (split == "held_out"):
            names.append(name)
    return names


def ingredient_names() -> set[str]:
    """What the dishes are made of, without the way of cooking: 番茄, 番茄鸡蛋, 鸡蛋番茄, …"""
    return {"".join(ingredients) for ingredients, _ in _DISHES.values()}


# -------------------------------------------------------------------------------------- images


def draw_dish(name: str, size: int = 64, seed: int = 0) -> np.ndarray:
    """Draw a dish: uint8 [3, size, size]; arguments and errors as for `compose`."""
    return compose(name, size, seed).image


def compose(name: str, size: int = 64, seed: int = 0) -> Composition:
    """Draw a dish, and return its height map and its map of parts, too.

    name: one of `dish_names`
    size: side of the image in pixels, 32 … 512
    seed: the same name and seed give the same dish at every size

    Raises ValueError for an unknown name and for a size outside of this range.
    """
    return render_scene(choose_dish_scene(name, seed), size)


def choose_dish_scene(name: str, seed: int) -> Scene:
    """The scene of a dish; arguments and errors as for `compose`."""
    ingredients, way = attributes(name)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return choose_scene(ingredients, way, rng)


# -------------------------------------------------------------------------------------- dataset


def collate_captions(items: list[tuple]) -> tuple[torch.Tensor, list]:
    """A batch of items (image [...], caption): (images [B, ...], list of the B captions).

    It is for captions that are tuples, such as (sound, ingredients), which torch's
    `default_collate` would take apart.
    """
    images, captions = zip(*items)
    return torch.stack(images), list(captions)


class Dishes(torch.utils.data.Dataset):
    """Item i is (image uint8 [3, size, size], name): a drawn dish that depends on seed and i only.

    length: number of items
    size: side of the images in pixels, 32 … 512
    split: "train" or "held_out"
    seed: another seed gives other names and other images

    One training dish in eight has one ingredient, the others have two.
    """

    def __init__(self, length: int = 20_000, size: int = 64, split: str = "train", seed: int = 0):
        self.length = length
        self.size = size
        self.seed = seed
        names = dish_names(split)
        one = [name for name in names if len(attributes(name).ingredients) == 1]
        two = [name for name in names if len(attributes(name).ingredients) == 2]
        if not one:  # in the split "held_out" each name has two ingredients
            one = two
        self.one_ingredient_names = one
        self.two_ingredient_names = two

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        name, seed = self.choose(index)
        return torch.from_numpy(draw_dish(name, self.size, seed)), name

    def choose(self, index: int) -> tuple[str, int]:
        """The name and the seed of dish `index`, for `draw_dish` or `compose`.

        Raises IndexError for an index outside of the dataset.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"dish {index} of {self.length}")
        seed = self.seed * 1_000_003 + index
        rng = random.Random(seed)
        has_one_ingredient = rng.random() < 0.125
        names = self.one_ingredient_names if has_one_ingredient else self.two_ingredient_names
        return rng.choice(names), seed
