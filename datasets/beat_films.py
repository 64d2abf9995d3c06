"""Films of dishes that are tossed when the pan crackles, with their sounds.

The sound of a film is a sizzle, with a loud crackle at each frame in which the ingredients are in
the air. `beats` measures how loud each frame is, a condition that a network of films can be given
beside the caption.

The file needs numpy and torch and, beside it, dish_films.py, dish_sounds.py, dishes.py,
dish_scene.py, dish_rendering.py and dish_shapes.py.

>>> film = draw_beat_film("番茄炒鸡蛋", size=32, seed=1)
>>> film.frames.shape, film.sound.shape
((8, 3, 32, 32), (16000,))
>>> bool(((beats(film.sound, frames=8) > 0.5) == film.is_tossed).all())
True
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch

from .dish_films import FPS, FRAMES, choose_item, toss
from .dish_scene import render_scene
from .dish_sounds import SAMPLE_RATE, add_events, crackle, make_noise
from .dishes import attributes, choose_dish_scene, collate_captions, dish_names


class BeatFilm(NamedTuple):
    """A film of a dish that is tossed when the pan crackles, and its sound.

    frames: uint8 [F, 3, size, size]. sound: float32 [F / FPS · SAMPLE_RATE].
    is_tossed: bool [F], the frames in which the ingredients are in the air.
    """

    frames: np.ndarray
    sound: np.ndarray
    is_tossed: np.ndarray


def draw_beat_film(name: str, size: int = 64, seed: int = 0, frames: int = FRAMES) -> BeatFilm:
    """Draw a film in which all ingredients hop at one to three random frames, and its sound.

    name, size and seed: as for `draw_dish`. frames: F, 4 or more, else ValueError.
    """
    if frames < 4:
        raise ValueError(f"a film with beats has at least 4 frames, not {frames}")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 2])
    is_tossed = choose_beats(rng, frames)
    sound = beat_sound(is_tossed, seed)

    scene = choose_dish_scene(name, seed)
    lying = render_scene(scene, size).image
    tossed = render_scene(toss(scene, rng.uniform(0.7, 1, len(scene.pieces))), size).image
    images = [tossed if is_in_the_air else lying for is_in_the_air in is_tossed]
    return BeatFilm(np.stack(images), sound, is_tossed)


def choose_beats(rng, frames: int) -> np.ndarray:
    """Choose one to three of the frames at random, no two of them adjacent: bool [frames].

    They are fewer than half of the frames, so that the median of all frames is that of the others.
    """
    is_tossed = np.zeros(frames, dtype=bool)
    count = rng.integers(1, min(3, (frames - 1) // 2) + 1)
    for frame in rng.permutation(frames)[:count]:
        if not is_tossed[[frame - 1, frame, (frame + 1) % frames]].any():
            is_tossed[frame] = True
    return is_tossed


def beat_sound(is_tossed: np.ndarray, seed: int = 0) -> np.ndarray:
    """A sizzle, with a loud crackle in the middle of each frame that is tossed: float32 [N].

    is_tossed: bool [F]. The sound lasts F / FPS seconds.
    """
    rng = np.random.default_rng([seed, 3])
    sound = 0.03 * make_noise(rng, round(len(is_tossed) / FPS * SAMPLE_RATE), 2000, 6500)
    for frame in np.flatnonzero(is_tossed):
        times = (frame + rng.uniform(0.25, 0.6, 6)) / FPS
        add_events(sound, times, lambda: crackle(rng, rng.uniform(0.3, 0.8)))
    return (rng.uniform(0.25, 1) * sound).clip(-1, 1).astype(np.float32)


def beats(sound: np.ndarray, frames: int) -> np.ndarray:
    """How much louder than usual the sound is during each frame of a film: float32 [F] in [0, 1].

        r_f = root mean square of the part of the sound that belongs to frame f
        beat_f = clip((r_f / median r - 1) / 2, 0, 1)

    sound: float [N]; silence has no beats. Raises ValueError for fewer samples than frames.
    """
    if len(sound) < frames:
        raise ValueError(f"a sound of {len(sound)} samples is too short for {frames} frames")
    parts = np.array_split(np.asarray(sound, dtype=np.float64), frames)
    rms = np.array([np.sqrt(np.mean(part ** 2)) for part in parts])
    return np.clip((rms / max(np.median(rms), 1e-6) - 1) / 2, 0, 1).astype(np.float32)


class BeatFilms(torch.utils.data.Dataset):
    """Item i is (frames uint8 [3, F, size, size], (name, beats float [F])).

    The beats come from the sound of the film. The names are of stir-fried dishes.

    length, size, split, seed: as for `Dishes`. frames: F.
    """

    def __init__(
        self, length: int, size: int = 64, split: str = "train", seed: int = 0, frames: int = FRAMES
    ):
        self.length = length
        self.size = size
        self.seed = seed
        self.frames = frames
        self.names = [name for name in dish_names(split) if attributes(name).way == "炒"]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        name, film = self.draw(index)
        frames = torch.from_numpy(film.frames).transpose(0, 1).contiguous()
        return frames, (name, torch.from_numpy(beats(film.sound, self.frames)))

    def draw(self, index: int) -> tuple[str, BeatFilm]:
        """The name and the film of item `index`; IndexError outside of the dataset."""
        name, seed = choose_item(self.names, self.length, self.seed, index)
        return name, draw_beat_film(name, self.size, seed, self.frames)

    collate = staticmethod(collate_captions)
