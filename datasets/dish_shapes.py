"""What dishes are drawn from: pieces of 20 ingredients, eight vessels, five tables, each computed as a sprite.

A sprite is an array [6, h, w]: red, green, blue, height, gloss, alpha. It has no light of its own: dishes.py
piles sprites up and lights the pile. An ingredient is a formula over the plane (u, v): an outline, which is
negative inside the piece, a height above the table and a tone, which picks the colour from a palette. To add an
ingredient, write such a formula and a line in INGREDIENTS. The file needs nothing but numpy.

>>> piece("番茄", variant=0, turn=0, pixels=32).shape
(6, 74, 74)
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------- shapes of a piece
# Each takes coordinates u, v (the piece reaches to about 1) and a generator, and returns
# outline (negative inside), height (≥ 0) and tone, the place in the ingredient's palette: 0, 1, 2 ... .

def _ramp(x, low, high):
    return np.clip((x - low) / (high - low), 0, 1)


def _noise(u, v, rng, frequency, waves=5):
    """Smooth noise of mean 0 in about [-1, 1]: a few plane waves of random direction."""
    total = 0
    for _ in range(waves):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        total = total + np.cos(frequency * (np.cos(angle) * u + np.sin(angle) * v) + phase)
    return total / waves ** 0.5 / 1.4


def _blob(u, v, rng, wobble=0.08, lobes=(2, 3, 5), squash=1.0):
    """Outline of a disc whose edge waves in and out."""
    theta, edge = np.arctan2(v / squash, u), 0.92
    for k in lobes:
        edge = edge + wobble * rng.uniform(0.5, 1) * np.cos(k * theta + rng.uniform(0, 6.3))
    return np.hypot(u, v / squash) - edge


def _box(u, v, a, b, corner):
    """Signed distance to a rectangle of half-sides a, b with round corners."""
    x, y = np.abs(u) - a + corner, np.abs(v) - b + corner
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0) - corner


def _dome(outline, rise=0.5):
    return rise * np.sqrt(np.clip(-outline, 0, 1))


def _tomato(u, v, rng):
    r = np.hypot(u, v + 0.5) / 1.25
    outline = np.maximum(r - 1, -v - 0.5)
    seeds = _ramp(np.hypot((np.abs(u) - 0.45) / 1.2, v + 0.02), 0.30, 0.20)
    return outline, _dome(outline, 0.45) - 0.12 * seeds, 1 + _ramp(r, 0.72, 0.86) - seeds


def _egg(u, v, rng):
    outline, folds = _blob(u, v, rng, 0.13), _noise(u, v, rng, 5)
    return outline, _dome(outline, 0.5) + 0.10 * folds, 1 + 1.2 * folds


def _potato(u, v, rng):
    outline = _box(u, v, 1.0, 0.42, 0.10)
    golden = _ramp(np.abs(u), 0.75, 1.0)
    return outline, 0.35 * _ramp(-outline, 0, 0.1), 1.2 + 0.4 * _noise(u, v, rng, 4) - golden


def _beef(u, v, rng):
    outline = _blob(u, v, rng, 0.12, squash=0.72)
    grain = np.cos(16 * v + 2 * _noise(u, v, rng, 3))
    return outline, 0.22 * _ramp(-outline, 0, 0.2) + 0.03 * grain, 1 + 0.7 * grain


def _tofu(u, v, rng):
    outline = _box(u, v, 0.82, 0.82, 0.12)
    return outline, 0.45 * _ramp(-outline, 0, 0.12), 1 + 0.4 * _noise(u, v, rng, 3) - _ramp(-outline, 0.22, 0.05)


def _shrimp(u, v, rng):
    theta, r = np.arctan2(v, u), np.hypot(u, v)
    thick = 0.42 - 0.09 * np.abs(theta + 0.3)
    outline = np.abs(r - 0.62) - np.maximum(thick, 0)
    outline = np.where(np.abs(theta) > 2.5, np.maximum(outline, 0.05), outline)
    stripes = np.cos(9 * theta)
    return outline, _dome(outline, 0.75) + 0.02 * stripes, 1 + stripes


def _eggplant(u, v, rng):
    outline = _box(u, v, 1.0, 0.48, 0.30)
    return outline, _dome(outline, 0.6), 1.9 * _ramp(v + 0.08 * _noise(u, v, rng, 4), -0.12, 0.06)


def _lettuce(u, v, rng):
    outline = _blob(u, v, rng, 0.07, (2, 7, 11))
    vein = _ramp(np.abs(v) + 0.25 * (u + 1), 0.34, 0.05) + 0.5 * _ramp(np.cos(9 * (np.abs(v) - 0.6 * u)), 0.85, 1)
    ruffle = _noise(u, v, rng, 7)
    return outline, 0.22 * _ramp(-outline, 0, 0.3) + 0.09 * ruffle, 1 + 0.5 * ruffle - np.minimum(vein, 1)


def _green_pepper(u, v, rng):
    bow = v - 0.45 * (1 - u * u) + 0.25
    outline = np.maximum(np.abs(bow) - 0.30, np.abs(u) - 0.98)
    return outline, _dome(outline, 0.65), 1 + 0.8 * _ramp(bow, -0.25, 0.3)


def _carrot(u, v, rng):
    outline, r = _blob(u, v, rng, 0.03), np.hypot(u, v)
    rays = 0.3 * np.cos(12 * np.arctan2(v, u)) * _ramp(r, 0.3, 0.6)
    return outline, 0.2 * _ramp(-outline, 0, 0.1), 1 + rays - _ramp(r, 0.42, 0.34)


def _cucumber(u, v, rng):
    outline, r, theta = _blob(u, v, rng, 0.02), np.hypot(u, v), np.arctan2(v, u)
    seeds = _ramp(np.cos(7 * theta), 0.3, 0.8) * _ramp(np.abs(r - 0.4), 0.16, 0.08)
    return outline, 0.16 * _ramp(-outline, 0, 0.08), 1 - 0.9 * seeds + _ramp(r, 0.70, 0.78)


def _wood_ear(u, v, rng):
    outline, folds = _blob(u, v, rng, 0.12, (3, 5, 8)), _noise(u, v, rng, 6)
    return outline, 0.25 * _ramp(-outline, 0, 0.2) + 0.16 * folds, 1 + folds


def _shiitake(u, v, rng):
    outline, r, theta = _blob(u, v, rng, 0.03), np.hypot(u, v), np.arctan2(v, u)
    star = _ramp(np.abs(np.sin(2 * theta)) * r, 0.30, 0.14) * _ramp(r, 0.75, 0.60)
    return outline, _dome(outline, 0.6) - 0.08 * star, 1 - 0.4 * _ramp(r, 0.6, 0.9) + star


def _broccoli(u, v, rng):
    bumps = np.cos(8 * u + rng.uniform(0, 6)) * np.cos(8 * v + rng.uniform(0, 6))
    outline = np.minimum(_blob(u / 0.95, (v + 0.2) / 0.78, rng, 0.06, (5, 9)), _box(u, v - 0.6, 0.24, 0.42, 0.08))
    stem = _ramp(v, 0.42, 0.52)
    return outline, _dome(outline, 0.6) + 0.10 * bumps * (1 - stem), 1 + 0.8 * bumps * (1 - stem) + 3 * stem


def _corn(u, v, rng):
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    outline = r - 0.90 - 0.06 * np.cos(9 * theta)
    kernels = _ramp(np.cos(9 * theta), -0.9, 0.2) * _ramp(r, 0.46, 0.54)
    return outline, 0.26 * _ramp(-outline, 0, 0.1) + 0.14 * kernels, _ramp(r, 0.46, 0.50) + kernels


def _onion(u, v, rng):
    r = np.hypot(u, v + 0.45)
    outline = np.maximum(r - 1.3, -v - 0.40)
    layers = np.cos(r * 2 * np.pi / 0.36)
    return outline, 0.22 + 0.10 * layers, 0.8 + layers


def _lotus(u, v, rng):
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    holes = _ramp(np.hypot(r * np.sin(3.5 * theta) / 3.5 * 2, r - 0.55), 0.24, 0.15)
    holes = np.maximum(holes, _ramp(r, 0.17, 0.10))
    outline = r - 0.95
    return outline, 0.20 * _ramp(-outline, 0, 0.08) * (1 - holes), 1 + _ramp(r, 0.82, 0.9) - holes


def _chili(u, v, rng):
    bow = v - 0.3 * u * u + 0.15
    outline = np.maximum(np.abs(bow) - 0.25 * np.clip(1.15 - u, 0.05, 1) ** 0.5, np.abs(u) - 1.05)
    return outline, _dome(outline, 0.8), 1 - 0.3 * u + 2.5 * _ramp(u, -0.72, -0.82)


def _pea(u, v, rng):
    outline = np.inf
    for turn in range(3):
        angle = 2.1 * turn + rng.uniform(-0.2, 0.2)
        outline = np.minimum(outline, np.hypot(u - 0.52 * np.cos(angle), v - 0.52 * np.sin(angle)) - 0.46)
    return outline, _dome(outline, 0.9), 1 + 0 * u


def _sausage(u, v, rng):
    outline = _blob(u, v, rng, 0.03, squash=0.85)
    fat = _ramp(_noise(u, v, rng, 11, 7), 0.55, 0.75)
    return outline, 0.22 * _ramp(-outline, 0, 0.1), 1 - 0.9 * fat + _ramp(-outline, 0.14, 0.06)


class Ingredient(NamedTuple):
    """The look of one piece: its shape, its reach (1 = the vessel's radius), its palette, its gloss in [0, 1]."""

    shape: object
    reach: float
    palette: str
    gloss: float


INGREDIENTS = {
    "番茄": Ingredient(_tomato, 0.36, "#ffcc58 #f2704a #d8201f", 0.6),
    "鸡蛋": Ingredient(_egg, 0.34, "#f6a91a #ffd02a #fff0a4", 0.3),
    "土豆": Ingredient(_potato, 0.38, "#a06a2a #d9a54f #ecca86", 0.2),
    "牛肉": Ingredient(_beef, 0.36, "#5c1f14 #8c4028 #b5674a", 0.4),
    "豆腐": Ingredient(_tofu, 0.30, "#e0a94e #fbf5e6 #ffffff", 0.2),
    "虾仁": Ingredient(_shrimp, 0.36, "#e2401f #f5764f #ffbfa3", 0.6),
    "茄子": Ingredient(_eggplant, 0.36, "#4b1d63 #8a5a96 #e9dcae", 0.5),
    "生菜": Ingredient(_lettuce, 0.41, "#f1f7b4 #a9d83c #76b022", 0.3),
    "青椒": Ingredient(_green_pepper, 0.36, "#6fc22f #2a9a22 #16721a", 0.8),
    "胡萝卜": Ingredient(_carrot, 0.29, "#ffc163 #f57f17 #e2650b", 0.3),
    "黄瓜": Ingredient(_cucumber, 0.32, "#f3f7cf #cfe89b #2f6d2a", 0.4),
    "木耳": Ingredient(_wood_ear, 0.34, "#15110f #2c2320 #4d3d35", 0.9),
    "香菇": Ingredient(_shiitake, 0.32, "#5f4a33 #9a8063 #fff3d6", 0.3),
    "西兰花": Ingredient(_broccoli, 0.36, "#0d453a #1d6b55 #4a9a78 #a9cfa0 #c3dfb4", 0.1),
    "玉米": Ingredient(_corn, 0.35, "#f4eab2 #b96a06 #f2a310", 0.6),
    "洋葱": Ingredient(_onion, 0.34, "#f7ecf4 #d9a3cb #9c3f8c", 0.5),
    "莲藕": Ingredient(_lotus, 0.36, "#6d543a #f0e2cc #c9a77c", 0.3),
    "辣椒": Ingredient(_chili, 0.40, "#f23a2c #d0141c #a30c16 #3d8f34", 0.9),
    "豌豆": Ingredient(_pea, 0.34, "#a6efb4 #5fd286 #33a55a", 0.7),
    "香肠": Ingredient(_sausage, 0.32, "#f9cfc8 #bd4a62 #8a2444", 0.5),
}

# ---------------------------------------------------------------- vessels
# radius:colour:height:gloss, from the middle of each vessel to its rim.
VESSELS = {
    "炒": "0:#f4efe6:.01:.5 .62:#f6f2ea:.02:.6 .80:#fdfbf6:.12:.7 .93:#fdfbf6:.16:.7 "
          ".935:#3565ad:.16:.7 .975:#3565ad:.17:.7 .98:#ffffff:.17:.7 1:#e6e2da:.10:.5",
    "汤": "0:#d79a3e:.16:.9 .79:#c98a32:.16:.9 .80:#f3eee4:.17:.8 "
          ".86:#fffdf8:.30:.8 .96:#f7f3ea:.30:.8 1:#d8d2c6:.16:.5",
    "蒸": "0:#e8cf95:.04:.1 .84:#d9b974:.04:.1 .845:#8d6430:.05:.1 .86:#d6a95e:.26:.2 "
          ".90:#e6bf78:.28:.2 .92:#a87a3f:.22:.1 .94:#e0b76c:.26:.2 1:#b98a4a:.20:.1",
    "砂锅": "0:#7c3d1a:.14:.8 .77:#6a3215:.14:.8 .78:#2b201b:.16:.4 "
          ".84:#4a372e:.30:.5 .93:#5b4438:.32:.5 1:#33261f:.14:.3",
    "凉拌": "0:#a9d6d3:.06:.8 .70:#9fd0cf:.07:.8 .88:#bfe5e1:.24:.9 "
          ".95:#5fa9ad:.25:.9 1:#86c0c0:.16:.8",
    "铁板": "0:#2e2e31:.04:.5 .80:#29292c:.04:.5 .83:#4b4b50:.12:.6 .89:#3a3a3e:.12:.5 "
          ".895:#8a5a2e:.06:.2 .99:#a06c39:.06:.2 1:#6d4422:.02:.1",
    "面": "0:#e9c987:.14:.4 .76:#e3bf79:.14:.4 .78:#b98a3e:.12:.8 .81:#2c4f8f:.18:.8 "
          ".87:#31589e:.30:.8 .95:#3c68b5:.30:.8 .96:#f4f1ea:.30:.8 1:#27447b:.14:.6",
    "盖饭": "0:#f6f3ea:.20:.1 .70:#f2eee3:.14:.1 .80:#e9e3d4:.10:.1 .82:#8c1c1c:.14:.8 "
          ".87:#b02a24:.28:.8 .95:#bd322a:.28:.8 .965:#e0b64a:.28:.8 1:#771616:.14:.6",
}
TABLES = ("#b9854f #8f6034", "#d9c3a0 #c7ab80", "#5b6068 #44484f", "#dfe3e2 #c3cacb", "#7d9aa6 #66838f")


def _rgb(text):
    """'#ff0000 #00ff00' → [2, 3] in [0, 1]."""
    return np.array([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in text.split()], dtype=np.float32)


def _colour(tone, palette):
    """Tone 0, 1, 2 ... → the palette's colours, mixed in between; [h, w] → [3, h, w]."""
    colours = _rgb(palette)
    return np.stack([np.interp(tone, np.arange(len(colours)), colours[:, c]) for c in range(3)])


def _sprite(colour, height, gloss, alpha):
    """[6, h, w] float32: red, green, blue, height, gloss, alpha."""
    return np.stack([*colour, height, np.broadcast_to(gloss, alpha.shape), alpha]).astype(np.float32)


def _grid(pixels, reach, angle=0.0):
    """Coordinates of pixel centres, ±reach, turned by an angle."""
    x = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels * 2 * reach - reach
    x, y = np.meshgrid(x, x)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


VARIANTS, TURNS = 3, 12


def render_piece(name, variant, turn, pixels):
    """One of an ingredient's pieces, turned by `turn` twelfths of a circle; pixels: its radius. [6, h, w]"""
    draw = _render_piece if pixels <= 40 else _render_piece.__wrapped__                   # small ones are kept: up to 130 MB
    return draw(name, variant, turn, pixels)


@lru_cache(maxsize=4096)
def _render_piece(name, variant, turn, pixels):
    look, side = INGREDIENTS[name], max(4, round(2.3 * pixels))
    u, v = _grid(side, 1.15, turn * np.pi / 6)
    outline, height, tone = look.shape(u, v, np.random.default_rng([variant, zlib.crc32(name.encode())]))
    alpha = np.clip(0.5 - outline * pixels, 0, 1)
    return _sprite(_colour(tone, look.palette), look.reach * np.maximum(height, 0), look.gloss, alpha)


@lru_cache(maxsize=256)
def render_vessel(way, pixels):
    """The empty vessel; pixels: its radius. [6, h, w]"""
    side = round(2.6 * pixels)
    x, y = _grid(side, 1.3)
    rng, r, theta = np.random.default_rng(7), np.hypot(x, y), np.arctan2(y, x)
    if way == "铁板":                                            # an oblong plate on a board
        r = np.maximum(_box(x, y, 1.12, 0.84, 0.25) + 1, 0)
    stops = [stop.split(":") for stop in VESSELS[way].split()]
    at = np.array([float(s[0]) for s in stops])
    colour = _colour(np.interp(r, at, np.arange(len(at))), " ".join(s[1] for s in stops))
    height, gloss = (np.interp(r, at, [float(s[i]) for s in stops]) for i in (2, 3))
    outline = r - 1
    if way == "砂锅":                                            # two ears
        ears = _box(np.abs(x) - 1.08, y, 0.16, 0.26, 0.12)
        colour = np.where(r > 1, _rgb("#3d2d25").T[..., None], colour)
        height, outline = np.where(r > 1, 0.16, height), np.minimum(outline, ears)
    if way == "蒸":                                              # slats
        slats = _ramp(np.abs(np.cos(9 * x)), 0.25, 0.0) * (r < 0.845)
        colour, height = colour * (1 - 0.35 * slats), height - 0.02 * slats
    if way == "面":                                              # strands that curl
        strands = np.cos(44 * r + 7 * np.cos(3 * theta + 2 * _noise(x, y, rng, 3))) * (r < 0.77)
        colour, height = colour * (1 + 0.10 * strands), height + 0.012 * strands
    if way == "盖饭":                                            # grains of rice
        grains = _noise(x, y, rng, 60, 9) * (r < 0.8)
        colour, height = colour * (1 + 0.04 * grains), height + 0.012 * grains
    return _sprite(colour, height, gloss, np.clip(0.5 - outline * pixels, 0, 1))


@lru_cache(maxsize=64)
def render_table(kind, pixels):
    """A table of planks, cloth or stone that tiles, [5, pixels, pixels]: colour, height, gloss."""
    x, y = (np.pi * c for c in _grid(pixels, 1.0))
    if kind < 2:
        plank = _ramp(np.abs(np.sin(2 * y)), 0.05, 0.0)
        tone = 0.5 + 0.35 * np.sin(12 * y + 1.5 * np.sin(x) + np.sin(3 * y)) + 0.15 * np.sin(30 * y) + plank
    else:
        tone = 0.4 + 0.25 * np.sin(2 * x + 2 * np.sin(y)) * np.sin(3 * y + np.sin(2 * x)) + 0.2 * np.sin(28 * x) * np.sin(28 * y)
        plank = 0 * x
    return _sprite(_colour(tone, TABLES[kind]), -0.02 * plank, 0.1, 0 * x)[:5]
