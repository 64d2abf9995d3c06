"""Drawn dishes with a reference image: another dish on the same table, in the same vessel.

The caption names the ingredients alone, 番茄鸡蛋. Which vessel they are in, and on which table it
stands, is seen in the reference image alone, whose ingredients are other ones:

    caption     番茄鸡蛋
    reference   清炒生菜, on a dark slate
    image       番茄炒鸡蛋, on the same slate, on a plate of the same size at the same place

`find_tabletop` says which table an image shows.

The file needs numpy and torch and, beside it, dishes.py, dish_scene.py, dish_rendering.py and
dish_shapes.py.

>>> image, (reference, ingredients) = ReferencedDishes(100, 64)[0]
>>> tuple(image.shape), tuple(reference.shape)
((3, 64, 64), (3, 64, 64))
"""

import random

import numpy as np
import torch

from .dish_rendering import TABLETOPS, render_tabletop
from .dish_scene import Scene, render_scene
from .dishes import Dishes, attributes, choose_dish_scene, collate_captions, dish_names


def choose_reference_scene(scene: Scene, ingredients: tuple[str, ...], seed: int) -> Scene:
    """The scene of a dish of other ingredients on the table, and in the vessel, of a scene.

    ingredients: of the scene; the reference has none of them.
    seed: of the other dish.
    """
    names = []
    for name in dish_names("train"):
        other_ingredients, way = attributes(name)
        if way == scene.way and not set(other_ingredients) & set(ingredients):
            names.append(name)
    other = choose_dish_scene(random.Random(seed).choice(names), seed)
    return scene._replace(pieces=other.pieces)


def find_tabletop(image: np.ndarray) -> int:
    """Which of TABLETOPS an image uint8 [3, H, W] of a drawn dish shows: its index.

    The corners of the image are compared with the mean colour of each tabletop. The brightness
    varies by a tenth, so that it counts less than the ratios of the colours.
    """
    side = image.shape[1] // 10
    corners = [image[:, y, x] for y in (slice(side), slice(-side, None))
               for x in (slice(side), slice(-side, None))]
    colour = np.log(np.mean([corner.mean(axis=(1, 2)) for corner in corners], axis=0) / 255 + 0.01)
    tabletops = [
        np.log(render_tabletop(index, 64)[:3].mean(axis=(1, 2)) + 0.01)
        for index in range(len(TABLETOPS))
    ]
    return int(np.argmin([_distance(colour, other) for other in tabletops]))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared distance of two logarithms of colours, in which their mean counts a sixth."""
    difference = a - b
    mean = difference.mean()
    return float(np.square(difference - mean).sum() + 0.5 * mean ** 2)


class ReferencedDishes(torch.utils.data.Dataset):
    """Item i is (image, (reference, ingredients)), both images uint8 [3, size, size].

    Arguments as for `Dishes`, and the same dishes.
    """

    def __init__(self, length: int = 20_000, size: int = 64, split: str = "train", seed: int = 0):
        self.dishes = Dishes(length, size, split, seed)

    def __len__(self):
        return len(self.dishes)

    def __getitem__(self, index):
        name, seed = self.dishes.choose(index)
        ingredients, _ = attributes(name)
        scene = choose_dish_scene(name, seed)
        reference = choose_reference_scene(scene, ingredients, seed + 1)
        images = [
            torch.from_numpy(render_scene(each, self.dishes.size).image)
            for each in (scene, reference)
        ]
        return images[0], (images[1], "".join(ingredients))

    collate = staticmethod(collate_captions)
