"""Drawn dishes with Chinese names: endless, reproducible, nothing to download.

A dish is a way of cooking and one or two ingredients, and its name is what a menu would say: 番茄炒鸡蛋
(tomato, stir-fried with egg), 土豆牛肉汤, 豆腐蒸虾仁, 砂锅茄子, 清炒生菜. Its picture is a pile of sprites seen from
above, each with a colour, a height and a gloss at every point. When the pile is complete, one light
falls on it, from the upper left:

    n = (-dh/dx, -dh/dy, 1) / |...|                          the surface's normal, from its height h
    picture = colour · (ambient + diffuse · max(n·l, 0) · shadow) + gloss · max(n·m, 0)^16 · shadow

with l the direction of the light and m half-way between l and the eye (Blinn, "Models of light reflection for
computer synthesized pictures", 1977). A point is in shadow where a neighbour towards the light stands higher.

A tenth of the ingredient pairs is held out: they appear in no training dish of any kind, so a held-out name
asks for a combination that a model has never seen. The sprites are in dish_shapes.py, which this file needs
beside it; otherwise numpy and torch.

>>> picture, name = Dishes(length=1000, size=64)[0]
>>> tuple(picture.shape), attributes("番茄炒鸡蛋")
((3, 64, 64), Attributes(ingredients=('番茄', '鸡蛋'), way='炒'))
"""

import difflib
import itertools
import random
import zlib
from typing import NamedTuple

import numpy as np
import torch

from .dish_shapes import INGREDIENTS, TABLES, TURNS, VARIANTS, render_piece, render_table, render_vessel


class Attributes(NamedTuple):
    """What must be seen in a dish's picture: one or two ingredients, and the way of cooking."""

    ingredients: tuple[str, ...]
    way: str


class Way(NamedTuple):
    """A way of cooking: the dish's name with one ingredient and with two, and how the pieces lie in the vessel."""

    name_of_one: str
    name_of_two: str
    pieces: int
    spread: float           # radius of the pile; 1 = the vessel's
    side_by_side: bool      # each ingredient on its own side, or all mixed


WAYS = {
    "炒": Way("清炒{}", "{}炒{}", 10, 0.66, False),               # stir-fried, on a plate
    "汤": Way("{}汤", "{}{}汤", 8, 0.63, False),                 # soup, in a bowl
    "蒸": Way("清蒸{}", "{}蒸{}", 10, 0.64, True),                # steamed, in bamboo
    "砂锅": Way("砂锅{}", "砂锅{}{}", 9, 0.61, False),             # in a clay pot
    "凉拌": Way("凉拌{}", "凉拌{}{}", 10, 0.62, True),              # a cold salad, in celadon
    "铁板": Way("铁板{}", "铁板{}{}", 10, 0.64, False),             # on a sizzling iron plate
    "面": Way("{}面", "{}{}面", 8, 0.55, True),                  # on noodles
    "盖饭": Way("{}盖饭", "{}{}盖饭", 8, 0.55, False),             # on rice
}
PAIRS = tuple(itertools.combinations(INGREDIENTS, 2))
HELD_OUT_PAIRS = frozenset(random.Random(1).sample(PAIRS, len(PAIRS) // 10))


def _all_dishes():
    for way, naming in WAYS.items():
        for one in INGREDIENTS:
            yield naming.name_of_one.format(one), Attributes((one,), way)
        for two in itertools.permutations(INGREDIENTS, 2):
            yield naming.name_of_two.format(*two), Attributes(two, way)


_DISHES = dict(_all_dishes())


def attributes(name: str) -> Attributes:
    """What must be in the picture of this dish. Raises ValueError, with the nearest names, for one that is no dish here."""
    if name not in _DISHES:
        near = "、".join(difflib.get_close_matches(name, _DISHES, 3, 0.3)) or "番茄炒鸡蛋"
        raise ValueError(f"{name!r} is not a dish that can be drawn. Near it: {near}. "
                         f"Ingredients: {'、'.join(INGREDIENTS)}. Ways: {'、'.join(WAYS)}.")
    return _DISHES[name]


def dish_names(split: str = "train") -> list[str]:
    """All names of a split, "train" or "held_out". A pair has two names in each way of cooking, one in each order."""
    if split not in ("train", "held_out"):
        raise ValueError(f'split is "train" or "held_out", not {split!r}')
    held_out = {name for name, dish in _DISHES.items()
                if HELD_OUT_PAIRS & {dish.ingredients, dish.ingredients[::-1]}}
    return [name for name in _DISHES if (name in held_out) == (split == "held_out")]


LIGHT, HALF_WAY = (-0.48, -0.52, 0.71), (-0.26, -0.28, 0.92)        # unit vectors l and m; x right, y down, z to the eye


def _paste(canvas, sprite, x, y, lift=0.0, tint=1.0, sink=0.0):
    """Lay a sprite on the canvas [5, n, n], its middle at pixel (x, y), raised by lift; sink fades it into what is below."""
    side, n = sprite.shape[-1], canvas.shape[-1]
    left, top = round(x - side / 2), round(y - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, n), min(top + side, n)
    sprite = sprite[:, y0 - top:y1 - top, x0 - left:x1 - left]
    tint_and_lift = np.array([*(np.ones(3) * tint), 1, 1], dtype=np.float32)[:, None, None]
    layer = sprite[:5] * tint_and_lift
    layer[3] += lift
    below = canvas[:, y0:y1, x0:x1]
    layer -= below
    layer *= sprite[5] * np.float32(1 - sink)
    below += layer


def _light(canvas):
    """One light over the pile: [5, n, n] → [3, n, n] in [0, 1]."""
    n = canvas.shape[-1]
    height, gloss = canvas[3] * np.float32(n / 2.6), canvas[4]      # height in pixels
    dx, dy = np.zeros_like(height), np.zeros_like(height)
    np.subtract(height[:, 1:], height[:, :-1], out=dx[:, 1:])
    np.subtract(height[1:], height[:-1], out=dy[1:])
    length = 1 / np.sqrt(dx * dx + dy * dy + 1)
    diffuse, shine = (np.maximum((z - x * dx - y * dy) * length, 0) for x, y, z in (LIGHT, HALF_WAY))
    shadow = np.zeros_like(height)
    for k in range(1, 6):                                           # neighbours towards the light, n/64 apart
        step = k * n // 64
        above, here = height[:-step, :-step] - np.float32(1.1 * step), shadow[step:, step:]
        np.maximum(here, above - height[step:, step:], out=here)
    lit = 1 - np.minimum(shadow * np.float32(26 / n), 0.55)
    for _ in range(4):                                              # to the power of 16
        shine *= shine
    picture = canvas[:3] * (0.42 + 0.82 * diffuse * lit)
    picture += 0.5 * gloss * shine * lit
    return np.clip(picture, 0, 1, out=picture)


def _positions(way, ingredients, rng):
    """Where the pieces lie, the outermost first: x, y [pieces] in units of the vessel's radius, and which ingredient each is."""
    pieces = way.pieces
    k, start = np.arange(pieces)[::-1], rng.uniform(0, 2 * np.pi)
    distance, angle = way.spread * np.sqrt((k + 0.6) / pieces), 2.39996 * k + start   # a sunflower's spiral
    x = distance * np.cos(angle) + rng.normal(0, 0.03, pieces)
    y = distance * np.sin(angle) + rng.normal(0, 0.03, pieces)
    if way.side_by_side:
        rank = np.argsort(np.argsort(x * np.cos(start) + y * np.sin(start)))
        return x, y, rank * len(ingredients) // pieces
    return x, y, (k + rng.integers(2)) % len(ingredients)             # in turn, so that none is hidden


def draw_dish(name: str, size: int = 64, seed: int = 0) -> np.ndarray:
    """The picture of a dish, uint8 [3, size, size]; the same (name, seed) gives the same dish at every size, 32 … 512.

    Raises ValueError for a name that is no dish, and for another size.
    """
    if not 32 <= size <= 512:
        raise ValueError(f"size is 32 to 512 pixels, not {size}")
    ingredients, way = attributes(name)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    n = size * 2 if size <= 128 else size                           # small pictures are drawn twice as large, then halved
    kind, shift = rng.integers(len(TABLES)), rng.random(2)
    canvas = np.roll(render_table(int(kind), n), tuple((shift * n).astype(int)), (1, 2))
    canvas[:3] *= rng.uniform(0.9, 1.1)
    radius = n / 2 * (0.78 + 0.04 * rng.integers(4))
    if way in ("砂锅", "铁板"):
        radius *= 0.92                                              # their ears and corners reach further
    centre = n / 2 + n * rng.uniform(-0.05, 0.05, 2)
    _paste(canvas, render_vessel(way, round(radius)), *centre, tint=rng.uniform(0.92, 1.04))
    tints = rng.uniform(0.9, 1.1, (2, 1)) * rng.uniform(0.95, 1.05, (2, 3))
    x, y, which = _positions(WAYS[way], ingredients, rng)
    if way == "铁板":
        x *= 1.25
    variant, turn = rng.integers(VARIANTS, size=len(x)), rng.integers(TURNS, size=len(x))
    brightness = rng.uniform(0.94, 1.06, len(x))
    for i, chosen in enumerate(which):
        name = ingredients[chosen]
        sprite = render_piece(name, int(variant[i]), int(turn[i]), round(INGREDIENTS[name].reach * radius))
        px, py = centre[0] + x[i] * radius, centre[1] + y[i] * radius
        lift = 0.6 * canvas[3, int(py), int(px)] + 0.02             # it leans on what lies there already
        _paste(canvas, sprite, px, py, lift, tints[chosen] * brightness[i], sink=0.12 if way == "汤" else 0.0)
    picture = _light(canvas)
    if n > size:
        picture = (picture[:, ::2] + picture[:, 1::2])
        picture = (picture[:, :, ::2] + picture[:, :, 1::2]) / 4
    return (picture * 255 + 0.5).astype(np.uint8)


class Dishes(torch.utils.data.Dataset):
    """`length` drawn dishes; item i is (picture uint8 [3, size, size], name), always the same for the same seed.

    split is "train" or "held_out". One training dish in eight has one ingredient, the others have two.
    """

    def __init__(self, length: int = 20_000, size: int = 64, split: str = "train", seed: int = 0):
        self.length, self.size, self.seed = length, size, seed
        names = dish_names(split)
        self.of_two = [name for name in names if len(attributes(name).ingredients) == 2]
        self.of_one = [name for name in names if len(attributes(name).ingredients) == 1] or self.of_two

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"dish {index} of {self.length}")
        seed = self.seed * 1_000_003 + index
        chance = random.Random(seed)
        name = chance.choice(self.of_one if chance.random() < 0.125 else self.of_two)
        return torch.from_numpy(draw_dish(name, self.size, seed)), name
