"""Films of drawn dishes: the plate turns, the ingredients are tossed, steam rises, soup sways.

The name of a film is a motion and the name of a dish:

    转动番茄炒鸡蛋      the plate turns once, and the light stays where it is
    翻炒番茄炒鸡蛋      the pieces hop, one after the other
    冒汽豆腐汤          steam rises
    晃动豆腐汤          the dish sways from left to right and back; the surface of a soup tilts
    静止清炒生菜        nothing moves

A film of F frames is one period of its motion: frame f shows the phase f / F, and what would be
frame F is frame 0. So every film is a loop. The motion is known exactly, see DishFilm.

Four pairs of a way of cooking and a motion are held out: no training film shows them.

The file needs numpy and torch and, beside it, dishes.py, dish_scene.py, dish_rendering.py and
dish_shapes.py.

>>> film = draw_film("转动铁板香菇辣椒", size=64)
>>> film.frames.shape, film.angles.tolist()
((8, 3, 64, 64), [0.0, 45.0, 90.0, 135.0, 180.0, 225.0, 270.0, 315.0])
>>> split_film_name("转动番茄炒鸡蛋")
('turn', '番茄炒鸡蛋')
"""

import random
import zlib
from typing import NamedTuple

import numpy as np
import torch

from .dish_rendering import ROTATIONS
from .dish_scene import Scene, render_scene, vessel_radius
from .dishes import attributes, choose_dish_scene, dish_names

MOTIONS = {"turn": "转动", "toss": "翻炒", "steam": "冒汽", "sway": "晃动", "still": "静止"}
HELD_OUT_MOTIONS = frozenset({("炒", "turn"), ("盖饭", "toss"), ("蒸", "steam"), ("面", "sway")})
SPLITS = ("train", "held_out", "held_out_motion")

FRAMES = 8
FPS = 8                 # frames per second
HOP = 0.5               # height of a hop, in units of the vessel's radius
SWAY = 0.12             # amplitude of the sway, in the same units
PUFFS = 6               # of steam


class DishFilm(NamedTuple):
    """A film of a drawn dish, and its true motion.

    frames: uint8 [F, 3, size, size]
    angles: [F], rotation of the plate in degrees, clockwise, from 0 up to 360
    positions: [F, pieces, 2], the middle of each piece, x and y in pixels
    heights: [F, pieces], how high each piece hops, from 0 to 1
    """

    frames: np.ndarray
    angles: np.ndarray
    positions: np.ndarray
    heights: np.ndarray


def split_film_name(name: str) -> tuple[str, str]:
    """Return the motion, a key of MOTIONS, and the name of the dish.

    Raises ValueError if the name does not begin with a motion, or for an unknown dish.
    """
    for motion, prefix in MOTIONS.items():
        if name.startswith(prefix):
            attributes(name[len(prefix):])
            return motion, name[len(prefix):]
    raise ValueError(f"the name of a film begins with {'、'.join(MOTIONS.values())}: {name!r}")


def film_names(split: str = "train") -> list[str]:
    """Return all names of films of a split.

    split: "train"; "held_out", dishes that no training film shows; or "held_out_motion", training
        dishes in the pairs of a way of cooking and a motion that no training film shows.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    return [
        prefix + name
        for name in dish_names("held_out" if split == "held_out" else "train")
        for motion, prefix in MOTIONS.items()
        if ((attributes(name).way, motion) in HELD_OUT_MOTIONS) == (split == "held_out_motion")
    ]


# ------------------------------------------------------------------------------------ one film


def draw_film(name: str, size: int = 64, seed: int = 0, frames: int = FRAMES) -> DishFilm:
    """Draw a film.

    name: see `split_film_name`
    size: side of the frames in pixels, 32 … 512
    seed: the same name of a dish and seed give the same dish, as `draw_dish` draws it
    frames: number of frames, 1 or more

    Raises ValueError for an unknown name, and for a size or a number of frames out of range.
    """
    motion, dish = split_film_name(name)
    if frames < 1:
        raise ValueError(f"a film has at least one frame, not {frames}")
    scene = choose_dish_scene(dish, seed)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 1])
    phases = rng.random(max(len(scene.pieces), PUFFS))
    origins = rng.uniform(-0.45, 0.45, (PUFFS, 2))

    images, positions, heights = [], [], []
    for f in range(frames):
        phase = f / frames
        moved, hops = move_scene(scene, motion, phase, phases)
        in_order = sorted(moved.pieces, key=lambda piece: piece.lift)      # the highest in front
        image = render_scene(moved._replace(pieces=in_order), size).image
        if motion == "steam":
            image = add_steam(image, scene, phase, phases, origins)
        images.append(image)
        positions.append([locate(moved, piece, size) for piece in moved.pieces])
        heights.append(hops)
    angles = 360 * np.arange(frames) / frames * (motion == "turn")
    return DishFilm(np.stack(images), angles, np.array(positions), np.array(heights))


def move_scene(scene: Scene, motion: str, phase: float, phases) -> tuple[Scene, list[float]]:
    """Move a scene to a phase of its motion, in 0 … 1; returns it and the heights of the hops.

    phases: [pieces], in 0 … 1, the phase at which each piece begins to hop.
    """
    hops = [0.0] * len(scene.pieces)
    if motion == "turn":
        angle = 2 * np.pi * phase
        cos, sin = np.cos(angle), np.sin(angle)
        pieces = [
            piece._replace(
                x=cos * piece.x - sin * piece.y,
                y=sin * piece.x + cos * piece.y,
                rotation=(piece.rotation + ROTATIONS * phase) % ROTATIONS,
            )
            for piece in scene.pieces
        ]
        return scene._replace(pieces=pieces, angle=angle), hops
    if motion == "toss":
        # A parabola during half of the period; the other half the piece lies still.
        for i in range(len(hops)):
            u = 2 * ((phase - phases[i]) % 1)
            hops[i] = 4 * u * (1 - u) if u < 1 else 0.0
        return toss(scene, hops), hops
    if motion == "sway":
        offset = SWAY * np.sin(2 * np.pi * phase)
        pieces = [piece._replace(x=piece.x + offset) for piece in scene.pieces]
        tilt = (1.5 * offset, 0.0) if scene.way == "汤" else (0.0, 0.0)
        return scene._replace(pieces=pieces, tilt=tilt), hops
    return scene, hops


def toss(scene: Scene, heights) -> Scene:
    """Lift each piece of a scene to its height, 0 … 1; it also looks larger then."""
    pieces = [
        piece._replace(lift=HOP * height, scale=1 + 0.35 * height)
        for piece, height in zip(scene.pieces, heights)
    ]
    return scene._replace(pieces=pieces)


def locate(scene: Scene, piece, size: int) -> tuple[float, float]:
    """The middle of a piece in an image, x and y in pixels."""
    radius = size / 2 * vessel_radius(scene)
    return tuple(
        size / 2 + size * centre + radius * offset
        for centre, offset in zip(scene.centre, (piece.x, piece.y))
    )


def add_steam(image: np.ndarray, scene: Scene, phase: float, phases, origins) -> np.ndarray:
    """Add puffs of steam to an image uint8 [3, size, size].

    A puff begins at its origin, rises towards the upper edge, grows and fades.

    phases: [PUFFS], in 0 … 1. origins: [PUFFS, 2], from the centre of the vessel, in its radii.
    """
    size = image.shape[-1]
    y, x = (np.indices((size, size)) + 0.5) / size - 0.5
    alpha = np.zeros((size, size))
    for start, (x0, y0) in zip(phases, origins):
        age = (phase + start) % 1
        across = x - scene.centre[0] - 0.4 * x0 - 0.03 * np.sin(2 * np.pi * (age + start))
        along = y - scene.centre[1] - 0.4 * y0 + 0.5 * age
        width = 0.06 + 0.10 * age
        strength = 0.7 * np.sin(np.pi * age) ** 2
        puff = strength * np.exp(-(across ** 2 + along ** 2) / (2 * width ** 2))
        alpha = 1 - (1 - alpha) * (1 - puff)
    return (image + alpha * (240.0 - image) + 0.5).clip(0, 255).astype(np.uint8)


# -------------------------------------------------------------------------------------- dataset


class DishFilms(torch.utils.data.Dataset):
    """Item i is (frames uint8 [F, 3, size, size], name): a film that depends on seed and i only.

    length: number of items
    size: side of the frames in pixels, 32 … 512
    split: one of SPLITS
    seed: another seed gives other names and other films
    frames: F
    """

    def __init__(
        self, length: int, size: int = 64, split: str = "train", seed: int = 0, frames: int = FRAMES
    ):
        self.length = length
        self.size = size
        self.seed = seed
        self.frames = frames
        self.names = film_names(split)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        name, seed = self.choose(index)
        film = draw_film(name, self.size, seed, self.frames)
        return torch.from_numpy(film.frames), name

    def choose(self, index: int) -> tuple[str, int]:
        """The name and the seed of film `index`, for `draw_film`.

        Raises IndexError for an index outside of the dataset.
        """
        return choose_item(self.names, self.length, self.seed, index)


def choose_item(names: list[str], length: int, seed: int, index: int) -> tuple[str, int]:
    """The name and the seed of item `index` of a dataset of `length` films.

    Raises IndexError for an index outside of the dataset.
    """
    if not 0 <= index < length:
        raise IndexError(f"film {index} of {length}")
    item_seed = seed * 1_000_003 + index
    return random.Random(item_seed).choice(names), item_seed
