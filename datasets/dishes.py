"""Synthetic images of dishes with Chinese names: unlimited, reproducible, nothing to download.

A dish has a way of cooking and one or two ingredients, and its name is what a menu would say:

    番茄炒鸡蛋      tomato, stir-fried with egg
    土豆牛肉汤      potato and beef soup
    豆腐蒸虾仁      tofu, steamed with shrimps
    清炒生菜        stir-fried lettuce

The scene is seen from above. It is composited from sprites, which are small images with
transparency: a tabletop, a vessel and pieces of the ingredients (dish_rendering.py). At each pixel
a sprite has a colour, a height h and a specular coefficient. After compositing, the scene is shaded
with one light from the upper left:

    n     = (-dh/dx, -dh/dy, 1) / |(-dh/dx, -dh/dy, 1)|                  surface normal
    image = colour · (0.42 + 0.82 · max(n·l, 0) · s) + 0.5 · specular · max(n·m, 0)^16 · s

    l    direction of the light
    m    direction half-way between the light and the eye
    s    shadow factor: 1 in the light, down to 0.45 in the shadow of a higher part of the surface

(Blinn, "Models of light reflection for computer synthesized pictures", 1977.)

A tenth of the pairs of ingredients is held out: these two ingredients are never combined in a
training dish, whatever the way of cooking. A held-out name asks a model for a combination that it
has never seen.

The file needs numpy and torch and, beside it, dish_rendering.py and dish_shapes.py.

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

from .dish_rendering import (
    ROTATIONS,
    TABLETOPS,
    VARIANTS,
    render_piece,
    render_tabletop,
    render_vessel,
)
from .dish_shapes import INGREDIENTS


class Attributes(NamedTuple):
    """What the image of a dish must show: one or two ingredients, and the way of cooking."""

    ingredients: tuple[str, ...]
    way: str


class Way(NamedTuple):
    """A way of cooking: how its dishes are named, and how the pieces lie in the vessel."""

    name_with_one: str  # pattern of the name of a dish with one ingredient
    name_with_two: str  # pattern of the name of a dish with two ingredients
    pieces: int  # number of pieces in the vessel
    pile_radius: float  # the pieces lie within this radius; 1 = the radius of the vessel
    side_by_side: bool  # each ingredient on its own side, or both mixed


WAYS = {
    "炒": Way("清炒{}", "{}炒{}", 10, 0.66, False),  # stir-fried, on a plate
    "汤": Way("{}汤", "{}{}汤", 8, 0.63, False),  # soup, in a bowl
    "蒸": Way("清蒸{}", "{}蒸{}", 10, 0.64, True),  # steamed, in a bamboo steamer
    "砂锅": Way("砂锅{}", "砂锅{}{}", 9, 0.61, False),  # stewed, in a clay pot
    "凉拌": Way("凉拌{}", "凉拌{}{}", 10, 0.62, True),  # cold salad, in a pale green bowl
    "铁板": Way("铁板{}", "铁板{}{}", 10, 0.64, False),  # on a sizzling iron plate
    "面": Way("{}面", "{}{}面", 8, 0.55, True),  # on noodles
    "盖饭": Way("{}盖饭", "{}{}盖饭", 8, 0.55, False),  # on rice
}
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


# -------------------------------------------------------------------------------------- rendering
# A canvas is an array [5, n, n] of red, green, blue, height and specular coefficient. A sprite has
# alpha as a sixth channel. A height of 1 is n / 2.6 pixels, about the radius of a vessel.

# Unit vectors: x points right, y down, z to the eye.
LIGHT = (-0.48, -0.52, 0.71)  # l
HALF_WAY = (-0.26, -0.28, 0.92)  # m, half-way between the light and the eye


PARTS = ("tabletop", "vessel", "first ingredient", "second ingredient")


class Composition(NamedTuple):
    """A drawn dish, and what it was composited from.

    image: uint8 [3, size, size]
    height: float32 [size, size], the height of the surface; 1 is about the radius of a vessel
    parts: uint8 [size, size], the index in PARTS of what is seen at each pixel
    """

    image: np.ndarray
    height: np.ndarray
    parts: np.ndarray


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
    if not 32 <= size <= 512:
        raise ValueError(f"size is 32 to 512 pixels, not {size}")
    ingredients, way = attributes(name)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    n = size * 2 if size <= 128 else size  # small images are drawn at twice the size, then halved

    # The tabletop, cyclically shifted.
    tabletop = rng.integers(len(TABLETOPS))
    shift = rng.random(2)
    offset = tuple((shift * n).astype(int))
    canvas = np.roll(render_tabletop(int(tabletop), n), offset, axis=(1, 2))
    canvas[:3] *= rng.uniform(0.9, 1.1)
    parts = np.zeros((n, n), np.uint8)

    # The vessel, near the centre of the image. It has one of four radii, so that few different
    # sprites are rendered and most come from the cache.
    radius = n / 2 * (0.78 + 0.04 * rng.integers(4))
    if way in ("砂锅", "铁板"):
        radius *= 0.92  # the handles of the pot and the corners of the plate extend further
    centre = n / 2 + n * rng.uniform(-0.05, 0.05, 2)
    vessel = render_vessel(way, round(radius))
    _paste(canvas, parts, 1, vessel, *centre, tint=rng.uniform(0.92, 1.04))

    # The pieces, from the outermost to the innermost.
    tints = rng.uniform(0.9, 1.1, (2, 1)) * rng.uniform(0.95, 1.05, (2, 3))  # [ingredient, RGB]
    x, y, ingredient_index = _arrange_pieces(WAYS[way], ingredients, rng)
    if way == "铁板":
        x *= 1.25  # the plate is oblong
    variant = rng.integers(VARIANTS, size=len(x))
    rotation = rng.integers(ROTATIONS, size=len(x))
    brightness = rng.uniform(0.94, 1.06, len(x))
    transparency = 0.12 if way == "汤" else 0.0  # the broth covers the pieces of a soup
    for i, k in enumerate(ingredient_index):
        piece_radius = round(INGREDIENTS[ingredients[k]].radius * radius)
        piece = render_piece(ingredients[k], int(variant[i]), int(rotation[i]), piece_radius)
        piece_x = centre[0] + x[i] * radius
        piece_y = centre[1] + y[i] * radius
        # A piece on top of others lies higher: by 0.6 of the height below its middle.
        height_below = canvas[3, int(piece_y), int(piece_x)]
        lift = 0.6 * height_below + 0.02
        tint = tints[k] * brightness[i]
        _paste(canvas, parts, 2 + k, piece, piece_x, piece_y, lift, tint, transparency)

    image = _shade(canvas)
    height = canvas[3]
    if n > size:
        image = _halve(image)
        height = _halve(height)
        parts = parts[1::2, 1::2]
    return Composition((image * 255 + 0.5).astype(np.uint8), height, parts)


def _halve(image):
    """The mean of 2×2 pixels: [..., n, n] → [..., n/2, n/2]."""
    image = image[..., ::2, :] + image[..., 1::2, :]
    return (image[..., ::2] + image[..., 1::2]) / 4


def _arrange_pieces(way, ingredients, rng):
    """Place the pieces on a Vogel spiral, as the seeds of a sunflower, with Gaussian jitter.

        r_k = pile_radius · sqrt((k + 0.6) / pieces),    angle_k = start + k · golden angle

    Returns x, y [pieces] in units of the vessel's radius, the outermost piece first, and the
    index of the ingredient of each piece.
    """
    pieces = way.pieces
    k = np.arange(pieces)[::-1]
    start = rng.uniform(0, 2 * np.pi)
    r = way.pile_radius * np.sqrt((k + 0.6) / pieces)
    angle = 2.39996 * k + start  # golden angle: π (3 - √5) = 2.39996 rad
    x = r * np.cos(angle) + rng.normal(0, 0.03, pieces)
    y = r * np.sin(angle) + rng.normal(0, 0.03, pieces)
    if way.side_by_side:
        # Sort the pieces along the direction `start`. Of two ingredients, the first half of the
        # sorted pieces gets index 0 and the second half index 1.
        position = x * np.cos(start) + y * np.sin(start)
        rank = np.argsort(np.argsort(position))  # rank of each piece in the sorted order
        ingredient_index = rank * len(ingredients) // pieces
    else:
        # Alternate along the spiral, so that both ingredients are visible.
        ingredient_index = (k + rng.integers(2)) % len(ingredients)
    return x, y, ingredient_index


def _paste(canvas, parts, part, sprite, x, y, lift=0.0, tint=1.0, transparency=0.0):
    """Composite a sprite [6, h, w] on the canvas [5, n, n] and on the map of parts, in place.

    part: index in PARTS of what the sprite is
    x, y: the pixel of the canvas on which the middle of the sprite lies
    lift: is added to the sprite's height
    tint: factor of its colour, one number or one per channel
    transparency: 0 … 1; the sprite's alpha is multiplied by 1 - transparency
    """
    # Clip the sprite to the canvas.
    side = sprite.shape[-1]
    n = canvas.shape[-1]
    left = round(x - side / 2)
    top = round(y - side / 2)
    x0, x1 = max(left, 0), min(left + side, n)
    y0, y1 = max(top, 0), min(top + side, n)
    sprite = sprite[:, y0 - top : y1 - top, x0 - left : x1 - left]
    region = canvas[:, y0:y1, x0:x1]  # a view: writing to it changes the canvas

    factors = np.array([*(np.ones(3) * tint), 1, 1], dtype=np.float32)
    layer = sprite[:5] * factors[:, None, None]
    layer[3] += lift
    alpha = sprite[5] * np.float32(1 - transparency)

    # region + alpha · (layer - region), in place to save time
    layer -= region
    layer *= alpha
    region += layer
    parts[y0:y1, x0:x1][alpha > 0.5] = part


def _shade(canvas):
    """Shade a canvas [5, n, n] with the formulas of the module's docstring: [3, n, n] in 0 … 1."""
    n = canvas.shape[-1]
    colour = canvas[:3]
    height = canvas[3] * np.float32(n / 2.6)  # in pixels
    specular = canvas[4]

    # The slopes of the surface: differences to the left and upper neighbours.
    dx = np.zeros_like(height)
    dy = np.zeros_like(height)
    np.subtract(height[:, 1:], height[:, :-1], out=dx[:, 1:])
    np.subtract(height[1:], height[:-1], out=dy[1:])
    inverse_norm = 1 / np.sqrt(dx * dx + dy * dy + 1)

    def cosine(direction):  # max(n·direction, 0)
        x, y, z = direction
        return np.maximum((z - x * dx - y * dy) * inverse_norm, 0)

    diffuse = cosine(LIGHT)  # max(n·l, 0)
    highlight = cosine(HALF_WAY)  # max(n·m, 0)
    for _ in range(4):  # to the power of 16
        highlight *= highlight

    # The light comes from the upper left. A ray that passes just over the surface at a pixel
    # descends by 1.1 pixels for each step of one pixel down and one to the right. Where it arrives
    # above the surface, it leaves a shadow. The excess is the height of the highest of five rays
    # above the surface.
    excess = np.zeros_like(height)
    for k in range(1, 6):
        step = k * n // 64
        surface = height[step:, step:]
        ray = height[:-step, :-step] - np.float32(1.1 * step)  # its height when it arrives
        highest = excess[step:, step:]  # a view: writing to it changes the excess
        np.maximum(highest, ray - surface, out=highest)
    shadow = 1 - np.minimum(excess * np.float32(26 / n), 0.55)  # 1 = no shadow

    image = colour * (0.42 + 0.82 * diffuse * shadow)
    image += 0.5 * specular * highlight * shadow
    return np.clip(image, 0, 1, out=image)


# -------------------------------------------------------------------------------------- dataset


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
