"""Drawn dishes with the masks of the camera moves: what the inpainting ControlNet is trained on.

A training example is an image and its control, the image with grey in the mask and the mask itself.
What the mask hides is known, since both sides of its edge are drawn. For a pan two dishes of the
same name lie side by side, and the window shows parts of both.

>>> image, name, extras = MaskedDishes(10, size=64)[0]
>>> tuple(image.shape), tuple(extras["control"].shape)
((3, 64, 64), (4, 64, 64))
"""

import random

import numpy as np
import torch

from datasets.dishes import Dishes, draw_dish

from .animation.camera import DIRECTIONS, MOVES, uncover
from .inpainting.control_inpainter import inpainting_control

SEED_OF_SECOND = 500_000        # is added to the seed of the first of two dishes side by side


class MaskedDishes(torch.utils.data.Dataset):
    """Item i is (image uint8 [3, size, size], name, {"control": uint8 [4, size, size]}).

    A camera move and its distance are drawn for each item. For a pan the image is a window over two
    dishes of the same name, and the mask is the strip that the window has entered. For circle and
    centre it is one dish, with the mask of that move.

    length, size, split, seed: as for Dishes.
    """

    def __init__(self, length: int, size: int = 64, split: str = "train", seed: int = 0):
        self.dishes = Dishes(length, size, split, seed)

    def __len__(self):
        return len(self.dishes)

    def __getitem__(self, index):
        name, seed = self.dishes.choose(index)
        size = self.dishes.size
        rng = random.Random(seed)
        move = rng.choice(MOVES)
        dish = draw_dish(name, size, seed).transpose(1, 2, 0)               # [size, size, 3]
        if move in DIRECTIONS:
            distance = rng.randint(size // 8, size * 7 // 8)
            dx, dy = DIRECTIONS[move]
            second = draw_dish(name, size, seed + SEED_OF_SECOND).transpose(1, 2, 0)
            image = move_window(dish, second, dx * distance, dy * distance)
        else:
            distance = rng.randint(size // 8, size // 5)
            image = dish
        _, mask = uncover(dish, move, distance)
        control = inpainting_control(image, mask)
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, name, {"control": torch.from_numpy(control)}


def move_window(first: np.ndarray, second: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The window over a plane of dishes, moved by (dx, dy) pixels from the first of them.

    first, second: uint8 [H, W, 3]. All neighbours of the first are the second.
    """
    h, w = first.shape[:2]
    plane = np.tile(second, (3, 3, 1))
    plane[h:2 * h, w:2 * w] = first
    return plane[h + dy:2 * h + dy, w + dx:2 * w + dx]
