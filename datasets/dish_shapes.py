"""The shapes of the 20 ingredients of a drawn dish, as functions of plane coordinates (u, v).

A dish shows several pieces of each ingredient. One piece, such as a tomato wedge, is described by a
function f(u, v, rng). Here u and v are arrays of coordinates, u to the right and v down, with the
piece between about -1 and 1. The random generator rng makes the pieces differ. The function returns
three arrays of the same shape:

    outline    negative inside the piece, 0 at its edge, positive outside
    height     height of the surface above the base of the piece
    tone       index into the ingredient's palette: 0 is the first colour, 1 the second; between
               two colours it is interpolated

To add an ingredient, write such a function and add an entry to INGREDIENTS. dish_rendering.py turns
a piece into an image, but this file does not need it. The file needs numpy.

>>> tomato = INGREDIENTS["番茄"]
>>> u, v = np.array([0.0, 0.0]), np.array([0.2, 2.0])  # one point inside the piece, one outside
>>> outline, height, tone = tomato.shape(u, v, np.random.default_rng(0))
>>> outline < 0
array([ True, False])
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# ------------------------------------------------------------------------------ building blocks


def linear_step(x, zero_at, one_at):
    """Rise linearly from 0 at x = zero_at to 1 at x = one_at; constant outside of this interval.

    With one_at < zero_at the function falls as x grows.
    """
    return np.clip((x - zero_at) / (one_at - zero_at), 0, 1)


def smooth_noise(u, v, rng, frequency, waves=5):
    """Smooth noise with mean 0 and std 0.5: a sum of plane waves with random directions."""
    total = 0
    for _ in range(waves):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        total = total + np.cos(frequency * (np.cos(angle) * u + np.sin(angle) * v) + phase)
    # A cosine has the std √(1/2), the sum has √(waves/2): this scales it to 0.5.
    return total / waves**0.5 / 1.4


def _wavy_disc(u, v, rng, amplitude=0.08, frequencies=(2, 3, 5), aspect=1.0):
    """Outline of a disc whose edge is r = 0.92 + a sum of waves with `frequencies` per turn.

    amplitude: largest amplitude of each wave
    aspect: height of the disc as a fraction of its width
    """
    theta = np.arctan2(v / aspect, u)
    edge = 0.92
    for frequency in frequencies:
        wave_amplitude = amplitude * rng.uniform(0.5, 1)
        phase = rng.uniform(0, 6.3)
        edge = edge + wave_amplitude * np.cos(frequency * theta + phase)
    return np.hypot(u, v / aspect) - edge


def rounded_box(u, v, half_width, half_height, corner_radius):
    """Outline of a rectangle with round corners: the signed distance to its edge."""
    x = np.abs(u) - half_width + corner_radius
    y = np.abs(v) - half_height + corner_radius
    outside = np.hypot(np.maximum(x, 0), np.maximum(y, 0))
    inside = np.minimum(np.maximum(x, y), 0)
    return outside + inside - corner_radius


def _dome(outline, height=0.5):
    """Height of a dome: height · √depth, where depth = -outline is clipped to 0 … 1."""
    return height * np.sqrt(np.clip(-outline, 0, 1))


# ---------------------------------------------------------------------------------- ingredients
# Each function returns (outline, height, tone); see the module's docstring.


def _tomato(u, v, rng):
    """A wedge: a segment of a disc, with a skin along the arc and two pockets of seeds."""
    r = np.hypot(u, v + 0.5) / 1.25
    outline = np.maximum(r - 1, -v - 0.5)
    seeds = linear_step(np.hypot((np.abs(u) - 0.45) / 1.2, v + 0.02), 0.30, 0.20)
    skin = linear_step(r, 0.72, 0.86)
    return outline, _dome(outline, 0.45) - 0.12 * seeds, 1 + skin - seeds


def _egg(u, v, rng):
    """A scrambled lump with folds."""
    outline = _wavy_disc(u, v, rng, 0.13)
    folds = smooth_noise(u, v, rng, 5)
    return outline, _dome(outline, 0.5) + 0.10 * folds, 1 + 1.2 * folds


def _potato(u, v, rng):
    """A fry with browned ends."""
    outline = rounded_box(u, v, 1.0, 0.42, 0.10)
    browned = linear_step(np.abs(u), 0.75, 1.0)
    height = 0.35 * linear_step(-outline, 0, 0.1)
    return outline, height, 1.2 + 0.4 * smooth_noise(u, v, rng, 4) - browned


def _beef(u, v, rng):
    """A flat slice with a grain of irregular parallel lines."""
    outline = _wavy_disc(u, v, rng, 0.12, aspect=0.72)
    grain = np.cos(16 * v + 2 * smooth_noise(u, v, rng, 3))
    height = 0.22 * linear_step(-outline, 0, 0.2) + 0.03 * grain
    return outline, height, 1 + 0.7 * grain


def _tofu(u, v, rng):
    """A cube with a browned rim."""
    outline = rounded_box(u, v, 0.82, 0.82, 0.12)
    height = 0.45 * linear_step(-outline, 0, 0.12)
    noise = smooth_noise(u, v, rng, 3)
    browned = linear_step(-outline, 0.22, 0.05)
    return outline, height, 1 + 0.4 * noise - browned


def _shrimp(u, v, rng):
    """A curled ring that tapers and stays open on the left, with stripes across."""
    theta = np.arctan2(v, u)
    r = np.hypot(u, v)
    half_thickness = 0.42 - 0.09 * np.abs(theta + 0.3)
    outline = np.abs(r - 0.62) - np.maximum(half_thickness, 0)
    opening = np.abs(theta) > 2.5  # theta = ±π is the left
    outline = np.where(opening, np.maximum(outline, 0.05), outline)  # positive in the opening
    stripes = np.cos(9 * theta)
    return outline, _dome(outline, 0.75) + 0.02 * stripes, 1 + stripes


def _eggplant(u, v, rng):
    """A chunk, half skin (above) and half flesh, with an uneven border."""
    outline = rounded_box(u, v, 1.0, 0.48, 0.30)
    flesh = linear_step(v + 0.08 * smooth_noise(u, v, rng, 4), -0.12, 0.06)
    return outline, _dome(outline, 0.6), 1.9 * flesh


def _lettuce(u, v, rng):
    """A ruffled leaf with a middle vein that tapers and side veins."""
    outline = _wavy_disc(u, v, rng, 0.07, (2, 7, 11))
    middle_vein = linear_step(np.abs(v) + 0.25 * (u + 1), 0.34, 0.05)
    side_veins = linear_step(np.cos(9 * (np.abs(v) - 0.6 * u)), 0.85, 1)
    veins = middle_vein + 0.5 * side_veins
    ruffle = smooth_noise(u, v, rng, 7)
    height = 0.22 * linear_step(-outline, 0, 0.3) + 0.09 * ruffle
    return outline, height, 1 + 0.5 * ruffle - np.minimum(veins, 1)


def _green_pepper(u, v, rng):
    """A strip bent along a parabola, darker towards one edge."""
    across = v - 0.45 * (1 - u * u) + 0.25  # distance from the centre line
    outline = np.maximum(np.abs(across) - 0.30, np.abs(u) - 0.98)
    return outline, _dome(outline, 0.65), 1 + 0.8 * linear_step(across, -0.25, 0.3)


def _carrot(u, v, rng):
    """A round slice with a light core and rays around it."""
    outline = _wavy_disc(u, v, rng, 0.03)
    r = np.hypot(u, v)
    rays = 0.3 * np.cos(12 * np.arctan2(v, u)) * linear_step(r, 0.3, 0.6)
    core = linear_step(r, 0.42, 0.34)
    return outline, 0.2 * linear_step(-outline, 0, 0.1), 1 + rays - core


def _cucumber(u, v, rng):
    """A round slice with a dark skin and a ring of seven seeds."""
    outline = _wavy_disc(u, v, rng, 0.02)
    r = np.hypot(u, v)
    theta = np.arctan2(v, u)
    seven_sectors = linear_step(np.cos(7 * theta), 0.3, 0.8)
    seeds = seven_sectors * linear_step(np.abs(r - 0.4), 0.16, 0.08)
    skin = linear_step(r, 0.70, 0.78)
    return outline, 0.16 * linear_step(-outline, 0, 0.08), 1 - 0.9 * seeds + skin


def _wood_ear(u, v, rng):
    """A thin piece of fungus with a jagged edge and strong folds."""
    outline = _wavy_disc(u, v, rng, 0.12, (3, 5, 8))
    folds = smooth_noise(u, v, rng, 6)
    height = 0.25 * linear_step(-outline, 0, 0.2) + 0.16 * folds
    return outline, height, 1 + folds


def _shiitake(u, v, rng):
    """A domed cap with a cross cut into it, darker towards the rim."""
    outline = _wavy_disc(u, v, rng, 0.03)
    r = np.hypot(u, v)
    theta = np.arctan2(v, u)
    cross = linear_step(np.abs(np.sin(2 * theta)) * r, 0.30, 0.14) * linear_step(r, 0.75, 0.60)
    height = _dome(outline, 0.6) - 0.08 * cross
    return outline, height, 1 - 0.4 * linear_step(r, 0.6, 0.9) + cross


def _broccoli(u, v, rng):
    """A crown of small bumps above a stem."""
    bumps = np.cos(8 * u + rng.uniform(0, 6)) * np.cos(8 * v + rng.uniform(0, 6))
    crown_outline = _wavy_disc(u / 0.95, (v + 0.2) / 0.78, rng, 0.06, (5, 9))
    stem_outline = rounded_box(u, v - 0.6, 0.24, 0.42, 0.08)
    outline = np.minimum(crown_outline, stem_outline)  # union of the two
    stem = linear_step(v, 0.42, 0.52)
    height = _dome(outline, 0.6) + 0.10 * bumps * (1 - stem)
    return outline, height, 1 + 0.8 * bumps * (1 - stem) + 3 * stem


def _corn(u, v, rng):
    """A slice of a cob: a core, and a ring of nine kernels around it."""
    r = np.hypot(u, v)
    theta = np.arctan2(v, u)
    outline = r - 0.90 - 0.06 * np.cos(9 * theta)
    kernels = linear_step(np.cos(9 * theta), -0.9, 0.2) * linear_step(r, 0.46, 0.54)
    height = 0.26 * linear_step(-outline, 0, 0.1) + 0.14 * kernels
    return outline, height, linear_step(r, 0.46, 0.50) + kernels


def _onion(u, v, rng):
    """A segment of a slice with concentric layers."""
    r = np.hypot(u, v + 0.45)
    outline = np.maximum(r - 1.3, -v - 0.40)
    layers = np.cos(r * 2 * np.pi / 0.36)
    return outline, 0.22 + 0.10 * layers, 0.8 + layers


def _lotus(u, v, rng):
    """A round slice of lotus root: one hole in the middle and seven around it."""
    r = np.hypot(u, v)
    theta = np.arctan2(v, u)
    # The outer holes have their centres at the radius 0.55 and at the seven angles where
    # sin(3.5 θ) = 0. Near such an angle, ± r · sin(3.5 θ) / 3.5 is the distance to it along the
    # circle. The factor 2 makes the holes half as wide in this direction.
    along = r * np.sin(3.5 * theta) / 3.5 * 2
    distance = np.hypot(along, r - 0.55)
    holes = linear_step(distance, 0.24, 0.15)
    holes = np.maximum(holes, linear_step(r, 0.17, 0.10))
    outline = r - 0.95
    height = 0.20 * linear_step(-outline, 0, 0.08) * (1 - holes)
    return outline, height, 1 + linear_step(r, 0.82, 0.9) - holes


def _chili(u, v, rng):
    """A bent pod that narrows to a point on the right, with a stalk on the left."""
    across = v - 0.3 * u * u + 0.15  # distance from the centre line
    half_thickness = 0.25 * np.clip(1.15 - u, 0.05, 1) ** 0.5
    outline = np.maximum(np.abs(across) - half_thickness, np.abs(u) - 1.05)
    stalk = linear_step(u, -0.72, -0.82)
    return outline, _dome(outline, 0.8), 1 - 0.3 * u + 2.5 * stalk


def _pea(u, v, rng):
    """Three peas that touch."""
    outline = np.inf
    for k in range(3):
        angle = 2.1 * k + rng.uniform(-0.2, 0.2)
        centre_u = 0.52 * np.cos(angle)
        centre_v = 0.52 * np.sin(angle)
        outline = np.minimum(outline, np.hypot(u - centre_u, v - centre_v) - 0.46)
    return outline, _dome(outline, 0.9), np.ones_like(u)


def _sausage(u, v, rng):
    """An oval slice with grains of fat and a dark casing."""
    outline = _wavy_disc(u, v, rng, 0.03, aspect=0.85)
    fat = linear_step(smooth_noise(u, v, rng, 11, 7), 0.55, 0.75)
    casing = linear_step(-outline, 0.14, 0.06)
    return outline, 0.22 * linear_step(-outline, 0, 0.1), 1 - 0.9 * fat + casing


class Ingredient(NamedTuple):
    """Shape, size and surface of the pieces of an ingredient."""

    shape: Callable  # one of the functions above
    radius: float  # radius of a piece; 1 = the radius of the vessel
    palette: str  # the colours of tone 0, 1, 2, …
    specular: float  # specular coefficient, 0 … 1


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
