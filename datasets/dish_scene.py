"""The scene of a drawn dish: a tabletop, a vessel and the pieces in it; composited and shaded.

A scene is a list of what is where. `choose_scene` draws one at random, `render_scene` composites
its sprites (dish_rendering.py) and shades the result with one light from the upper left:

    n     = (-dh/dx, -dh/dy, 1) / |(-dh/dx, -dh/dy, 1)|                  surface normal
    image = colour · (0.42 + 0.82 · max(n·l, 0) · s) + 0.5 · specular · max(n·m, 0)^16 · s

    h    height of the surface
    l    direction of the light
    m    direction half-way between the light and the eye
    s    shadow factor: 1 in the light, down to 0.45 in the shadow of a higher part of the surface

(Blinn, "Models of light reflection for computer synthesized pictures", 1977.)

Between the two a scene may be changed: dish_films.py moves its pieces from frame to frame.

The file needs numpy and, beside it, dish_rendering.py and dish_shapes.py.

>>> scene = choose_scene(("番茄", "鸡蛋"), "炒", np.random.default_rng(0))
>>> len(scene.pieces), render_scene(scene, size=64).image.shape
(10, (3, 64, 64))
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .dish_rendering import (
    ROTATIONS,
    TABLETOPS,
    VARIANTS,
    render_piece,
    render_tabletop,
    render_vessel,
)
from .dish_shapes import INGREDIENTS


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


class Piece(NamedTuple):
    """A piece of an ingredient.

    ingredient: a key of INGREDIENTS
    part: index in PARTS
    variant, rotation: see render_piece
    x, y: its middle, from the centre of the vessel in units of the vessel's radius
    tint: [3], factor of its colour
    lift: is added to its height
    scale: factor of its radius
    """

    ingredient: str
    part: int
    variant: int
    rotation: float
    x: float
    y: float
    tint: np.ndarray
    lift: float = 0.0
    scale: float = 1.0


class Scene(NamedTuple):
    """What a drawn dish is composited from.

    way: a key of WAYS, of the vessel
    tabletop, tabletop_shift, tabletop_brightness: which of TABLETOPS, its cyclic shift as fractions
        of its sides, the factor of its colour
    radius, centre: of the vessel, as fractions of half the side of the image, and of its side
    vessel_tint: factor of the vessel's colour
    pieces: the outermost first, as they are composited
    angle: rotation of the vessel in radians
    tilt: slope of a soup's surface to the right and down
    """

    way: str
    tabletop: int
    tabletop_shift: tuple[float, float]
    tabletop_brightness: float
    radius: float
    centre: tuple[float, float]
    vessel_tint: float
    pieces: list[Piece]
    angle: float = 0.0
    tilt: tuple[float, float] = (0.0, 0.0)


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


def choose_scene(ingredients: Sequence[str], way: str, rng: np.random.Generator) -> Scene:
    """Draw a scene at random: one or two ingredients, cooked in one of WAYS."""
    tabletop = int(rng.integers(len(TABLETOPS)))
    tabletop_shift = tuple(rng.random(2))
    tabletop_brightness = rng.uniform(0.9, 1.1)

    # The vessel, near the centre of the image. It has one of four radii, so that few different
    # sprites are rendered and most come from the cache.
    radius = 0.78 + 0.04 * rng.integers(4)
    centre = tuple(rng.uniform(-0.05, 0.05, 2))
    vessel_tint = rng.uniform(0.92, 1.04)

    # The pieces, from the outermost to the innermost.
    tints = rng.uniform(0.9, 1.1, (2, 1)) * rng.uniform(0.95, 1.05, (2, 3))  # [ingredient, RGB]
    x, y, ingredient_index = _arrange_pieces(WAYS[way], ingredients, rng)
    if way == "铁板":
        x *= 1.25  # the plate is oblong
    variant = rng.integers(VARIANTS, size=len(x))
    rotation = rng.integers(ROTATIONS, size=len(x))
    brightness = rng.uniform(0.94, 1.06, len(x))
    pieces = [
        Piece(
            ingredients[k], 2 + int(k), int(variant[i]), int(rotation[i]), x[i], y[i],
            tints[k] * brightness[i],
        )
        for i, k in enumerate(ingredient_index)
    ]
    return Scene(
        way, tabletop, tabletop_shift, tabletop_brightness, radius, centre, vessel_tint, pieces
    )


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


# -------------------------------------------------------------------------------------- rendering
# A canvas is an array [5, n, n] of red, green, blue, height and specular coefficient. A sprite has
# alpha as a sixth channel. A height of 1 is n / 2.6 pixels, about the radius of a vessel.

# Unit vectors: x points right, y down, z to the eye.
LIGHT = (-0.48, -0.52, 0.71)  # l
HALF_WAY = (-0.26, -0.28, 0.92)  # m, half-way between the light and the eye


def vessel_radius(scene: Scene) -> float:
    """Radius of the vessel without its handles and corners, as a fraction of half the side."""
    return scene.radius * (0.92 if scene.way in ("砂锅", "铁板") else 1.0)


def render_scene(scene: Scene, size: int) -> Composition:
    """Composite and shade a scene.

    size: side of the image in pixels, 32 … 512; else ValueError
    """
    if not 32 <= size <= 512:
        raise ValueError(f"size is 32 to 512 pixels, not {size}")
    n = size * 2 if size <= 128 else size  # small images are drawn at twice the size, then halved

    # The tabletop, cyclically shifted.
    offset = tuple((np.array(scene.tabletop_shift) * n).astype(int))
    canvas = np.roll(render_tabletop(scene.tabletop, n), offset, axis=(1, 2))
    canvas[:3] *= scene.tabletop_brightness
    parts = np.zeros((n, n), np.uint8)

    radius = n / 2 * vessel_radius(scene)
    centre = n / 2 + n * np.array(scene.centre)
    vessel = render_vessel(scene.way, round(radius), scene.angle)
    _paste(canvas, parts, 1, vessel, *centre, tint=scene.vessel_tint)
    if any(scene.tilt):
        _tilt_surface(canvas, centre, radius, scene.tilt)

    transparency = 0.12 if scene.way == "汤" else 0.0  # the broth covers the pieces of a soup
    for piece in scene.pieces:
        piece_radius = round(INGREDIENTS[piece.ingredient].radius * radius * piece.scale)
        sprite = render_piece(piece.ingredient, piece.variant, piece.rotation, piece_radius)
        x = centre[0] + piece.x * radius
        y = centre[1] + piece.y * radius
        # A piece on top of others lies higher: by 0.6 of the height below its middle.
        lift = 0.6 * canvas[3, int(y), int(x)] + 0.02 + piece.lift
        _paste(canvas, parts, piece.part, sprite, x, y, lift, piece.tint, transparency)

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


def _tilt_surface(canvas, centre, radius, tilt):
    """Tilt the surface of the soup, within 0.78 of the vessel's radius, in place."""
    n = canvas.shape[-1]
    x, y = ((np.arange(n) - middle) / radius for middle in centre)
    x, y = np.meshgrid(x, y)
    inside = np.hypot(x, y) < 0.78
    canvas[3] += np.where(inside, tilt[0] * x + tilt[1] * y, 0)


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
