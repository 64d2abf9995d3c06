"""The sprites of a drawn dish: pieces of ingredients, eight vessels and five tabletops.

A sprite is a small image with transparency that is pasted on a larger one. Here it is an array
[6, h, w] of red, green, blue, height, specular coefficient and alpha. Its colours contain no light
and no shadow: dishes.py composites the sprites and then shades the result.

Heights are in units of the radius of the vessel.

The file needs numpy and, beside it, dish_shapes.py, which has the shapes of the ingredients.

>>> render_piece("番茄", variant=0, rotation=0, radius=32).shape  # round(2.3 · 32) = 74 pixels
(6, 74, 74)
"""

import zlib
from functools import lru_cache

import numpy as np

from .dish_shapes import INGREDIENTS, linear_step, rounded_box, smooth_noise

VARIANTS = 3  # number of random shapes per ingredient
ROTATIONS = 12  # number of orientations of a piece, 30° apart

# -------------------------------------------------------------------------- arrays and colours


def _grid(pixels, extent, angle=0.0):
    """Return coordinates x, y of pixels × pixels centres, from -extent to extent.

    angle: rotation of the coordinates in radians
    """
    x = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels * 2 * extent - extent
    x, y = np.meshgrid(x, x)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _rgb(palette):
    """Convert "#ff0000 #00ff00" to an array [2, 3] in [0, 1]."""
    colours = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in palette.split()]
    return np.array(colours, dtype=np.float32)


def _colour(tone, palette):
    """Map tones [h, w] to colours [3, h, w] by linear interpolation in the palette."""
    colours = _rgb(palette)
    tones = np.arange(len(colours))
    return np.stack([np.interp(tone, tones, colours[:, channel]) for channel in range(3)])


def _sprite(colour, height, specular, alpha):
    """Stack the channels of a sprite: float32 [6, h, w]."""
    specular = np.broadcast_to(specular, alpha.shape)
    return np.stack([*colour, height, specular, alpha]).astype(np.float32)


# ---------------------------------------------------------------------------------------- pieces


def render_piece(ingredient: str, variant: int, rotation: float, radius: int) -> np.ndarray:
    """Render one piece of an ingredient as a sprite [6, h, w].

    ingredient: a key of INGREDIENTS
    variant: which of the random shapes, 0 … VARIANTS - 1
    rotation: in steps of 30°; at rest a whole number, 0 … ROTATIONS - 1
    radius: radius of the piece in pixels
    """
    if radius <= 40:
        return _render_cached_piece(ingredient, variant, rotation, radius)
    return _render_piece(ingredient, variant, rotation, radius)


def _render_piece(ingredient, variant, rotation, radius):
    shape, relative_radius, palette, specular = INGREDIENTS[ingredient]
    side = max(4, round(2.3 * radius))
    u, v = _grid(side, 1.15, rotation * np.pi / 6)
    rng = np.random.default_rng([variant, zlib.crc32(ingredient.encode())])
    outline, height, tone = shape(u, v, rng)
    alpha = np.clip(0.5 - outline * radius, 0, 1)  # an edge one pixel wide
    # The shape's height is in units of the piece's radius, that of a sprite of the vessel's radius.
    height = relative_radius * np.maximum(height, 0)
    return _sprite(_colour(tone, palette), height, specular, alpha)


# Small pieces are cached, which takes up to 130 MB; large ones are rendered each time.
_render_cached_piece = lru_cache(maxsize=4096)(_render_piece)


# -------------------------------------------------------------------------- vessels, tabletops
# Profile of each vessel from its centre (0) to its rim (1): radius, colour, height, specular
# coefficient. Values in between are interpolated linearly.

VESSELS = {
    "炒": (
        (0.0, "#f4efe6", 0.01, 0.5),
        (0.62, "#f6f2ea", 0.02, 0.6),
        (0.8, "#fdfbf6", 0.12, 0.7),
        (0.93, "#fdfbf6", 0.16, 0.7),
        (0.935, "#3565ad", 0.16, 0.7),
        (0.975, "#3565ad", 0.17, 0.7),
        (0.98, "#ffffff", 0.17, 0.7),
        (1.0, "#e6e2da", 0.1, 0.5),
    ),
    "汤": (
        (0.0, "#d79a3e", 0.16, 0.9),
        (0.79, "#c98a32", 0.16, 0.9),
        (0.8, "#f3eee4", 0.17, 0.8),
        (0.86, "#fffdf8", 0.3, 0.8),
        (0.96, "#f7f3ea", 0.3, 0.8),
        (1.0, "#d8d2c6", 0.16, 0.5),
    ),
    "蒸": (
        (0.0, "#e8cf95", 0.04, 0.1),
        (0.84, "#d9b974", 0.04, 0.1),
        (0.845, "#8d6430", 0.05, 0.1),
        (0.86, "#d6a95e", 0.26, 0.2),
        (0.9, "#e6bf78", 0.28, 0.2),
        (0.92, "#a87a3f", 0.22, 0.1),
        (0.94, "#e0b76c", 0.26, 0.2),
        (1.0, "#b98a4a", 0.2, 0.1),
    ),
    "砂锅": (
        (0.0, "#7c3d1a", 0.14, 0.8),
        (0.77, "#6a3215", 0.14, 0.8),
        (0.78, "#2b201b", 0.16, 0.4),
        (0.84, "#4a372e", 0.3, 0.5),
        (0.93, "#5b4438", 0.32, 0.5),
        (1.0, "#33261f", 0.14, 0.3),
    ),
    "凉拌": (
        (0.0, "#a9d6d3", 0.06, 0.8),
        (0.7, "#9fd0cf", 0.07, 0.8),
        (0.88, "#bfe5e1", 0.24, 0.9),
        (0.95, "#5fa9ad", 0.25, 0.9),
        (1.0, "#86c0c0", 0.16, 0.8),
    ),
    "铁板": (
        (0.0, "#2e2e31", 0.04, 0.5),
        (0.8, "#29292c", 0.04, 0.5),
        (0.83, "#4b4b50", 0.12, 0.6),
        (0.89, "#3a3a3e", 0.12, 0.5),
        (0.895, "#8a5a2e", 0.06, 0.2),
        (0.99, "#a06c39", 0.06, 0.2),
        (1.0, "#6d4422", 0.02, 0.1),
    ),
    "面": (
        (0.0, "#e9c987", 0.14, 0.4),
        (0.76, "#e3bf79", 0.14, 0.4),
        (0.78, "#b98a3e", 0.12, 0.8),
        (0.81, "#2c4f8f", 0.18, 0.8),
        (0.87, "#31589e", 0.3, 0.8),
        (0.95, "#3c68b5", 0.3, 0.8),
        (0.96, "#f4f1ea", 0.3, 0.8),
        (1.0, "#27447b", 0.14, 0.6),
    ),
    "盖饭": (
        (0.0, "#f6f3ea", 0.2, 0.1),
        (0.7, "#f2eee3", 0.14, 0.1),
        (0.8, "#e9e3d4", 0.1, 0.1),
        (0.82, "#8c1c1c", 0.14, 0.8),
        (0.87, "#b02a24", 0.28, 0.8),
        (0.95, "#bd322a", 0.28, 0.8),
        (0.965, "#e0b64a", 0.28, 0.8),
        (1.0, "#771616", 0.14, 0.6),
    ),
}
TABLETOPS = (  # the two colours of each; the first two are wood, the others cloth or stone
    "#b9854f #8f6034",
    "#d9c3a0 #c7ab80",
    "#5b6068 #44484f",
    "#dfe3e2 #c3cacb",
    "#7d9aa6 #66838f",
)


@lru_cache(maxsize=256)
def render_vessel(way: str, radius: int, angle: float = 0.0) -> np.ndarray:
    """Render the empty vessel of a way of cooking as a sprite [6, h, w].

    way: a key of VESSELS
    radius: radius of the vessel in pixels
    angle: its rotation in radians
    """
    side = round(2.6 * radius)
    x, y = _grid(side, 1.3, angle)
    rng = np.random.default_rng(7)
    r = np.hypot(x, y)
    theta = np.arctan2(y, x)
    if way == "铁板":
        # An oblong plate with the edge of a rounded rectangle. The signed distance to this edge is
        # negative inside; adding 1 gives 1 at the edge, as r has at the edge of a round vessel.
        distance = rounded_box(x, y, 1.12, 0.84, 0.25)
        r = np.maximum(distance + 1, 0)

    # Interpolate the profile at each pixel's radius.
    radii, colours, heights, speculars = zip(*VESSELS[way])
    tone = np.interp(r, radii, np.arange(len(radii)))
    colour = _colour(tone, " ".join(colours))
    height = np.interp(r, radii, heights)
    specular = np.interp(r, radii, speculars)
    outline = r - 1

    # Details of single vessels.
    if way == "砂锅":  # two handles
        handles = rounded_box(np.abs(x) - 1.08, y, 0.16, 0.26, 0.12)
        handle_colour = _rgb("#3d2d25").T[..., None]  # [3, 1, 1]
        colour = np.where(r > 1, handle_colour, colour)
        height = np.where(r > 1, 0.16, height)
        outline = np.minimum(outline, handles)
    if way == "蒸":  # the gaps between bamboo slats
        gaps = linear_step(np.abs(np.cos(9 * x)), 0.25, 0.0) * (r < 0.845)
        colour = colour * (1 - 0.35 * gaps)
        height = height - 0.02 * gaps
    if way == "面":  # curled noodles
        curl = 7 * np.cos(3 * theta + 2 * smooth_noise(x, y, rng, 3))
        noodles = np.cos(44 * r + curl) * (r < 0.77)
        colour = colour * (1 + 0.10 * noodles)
        height = height + 0.012 * noodles
    if way == "盖饭":  # grains of rice
        grains = smooth_noise(x, y, rng, 60, 9) * (r < 0.8)
        colour = colour * (1 + 0.04 * grains)
        height = height + 0.012 * grains

    alpha = np.clip(0.5 - outline * radius, 0, 1)
    return _sprite(colour, height, specular, alpha)


@lru_cache(maxsize=64)
def render_tabletop(index: int, pixels: int) -> np.ndarray:
    """Render a tabletop as a tileable texture [5, pixels, pixels]: a sprite without alpha.

    index: which of TABLETOPS
    """
    x, y = (np.pi * coordinate for coordinate in _grid(pixels, 1.0))  # -π … π
    if index < 2:  # wood: a wavy grain, and grooves between the planks
        grooves = linear_step(np.abs(np.sin(2 * y)), 0.05, 0.0)
        coarse_grain = 0.35 * np.sin(12 * y + 1.5 * np.sin(x) + np.sin(3 * y))
        fine_grain = 0.15 * np.sin(30 * y)
        tone = 0.5 + coarse_grain + fine_grain + grooves
    else:  # cloth or stone: large spots and a fine weave
        grooves = np.zeros_like(x)
        spots = 0.25 * np.sin(2 * x + 2 * np.sin(y)) * np.sin(3 * y + np.sin(2 * x))
        weave = 0.2 * np.sin(28 * x) * np.sin(28 * y)
        tone = 0.4 + spots + weave
    unused_alpha = np.zeros_like(x)
    sprite = _sprite(_colour(tone, TABLETOPS[index]), -0.02 * grooves, 0.1, unused_alpha)
    return sprite[:5]
