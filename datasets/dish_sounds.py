"""Sounds of cooking: synthesised, reproducible, one kind for each way of cooking.

    炒      stir-fry          a bright sizzle with crackles, and the spatula on the iron
    汤      soup              bubbles: damped chirps that rise
    蒸      steam             a hiss that swells and falls
    砂锅    clay pot          slow, deep bubbles over a rumble
    凉拌    cold dish         a knife on a board, evenly, with no fire
    铁板    iron plate        dense crackles that grow quieter
    面      noodles           boiling water, and dough that is slapped on the table
    盖饭    over rice         a ladle that rings on a bowl

Each sound varies: in pitch, tempo, loudness, and in the random times of its events. The parts are

    band of noise     white noise, of which the spectrum between two frequencies is kept
    event             a burst of noise or a sine, that decays exponentially with its own time

`Cooking` is a dataset of drawn dishes with the sound of how they are cooked, and the names of their
ingredients alone. So the way of cooking comes from the sound.

A sound is float32 [N] in [-1, 1], SAMPLE_RATE values a second. The file needs numpy and torch and,
beside it, dishes.py, dish_scene.py, dish_rendering.py and dish_shapes.py.

>>> sound = cook_sound("汤", seconds=1, seed=0)
>>> sound.shape, sound.dtype
((16000,), dtype('float32'))
"""

import zlib

import numpy as np
import torch

from .dishes import attributes, collate_captions

SAMPLE_RATE = 16_000    # Hz
SECONDS = 2.0


# ------------------------------------------------------------------------------------ parts


def make_noise(rng, samples: int, low: float, high: float) -> np.ndarray:
    """A band of noise [samples] from `low` to `high` Hz, with a standard deviation of 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum[(frequencies < low) | (frequencies > high)] = 0
    noise = np.fft.irfft(spectrum, samples)
    return noise / (noise.std() + 1e-9)


def random_times(rng, seconds: float, rate: float) -> np.ndarray:
    """Times of events, in seconds: a Poisson process with `rate` events a second."""
    return rng.uniform(0, seconds, rng.poisson(rate * seconds))


def regular_times(rng, seconds: float, rate: float) -> np.ndarray:
    """Times of events, in seconds: `rate` a second, from a random start, each a little off."""
    times = np.arange(rng.uniform(0, 1 / rate), seconds, 1 / rate)
    return np.abs(times + rng.normal(0, 0.05 / rate, len(times)))


def add_events(sound: np.ndarray, times, make_event) -> None:
    """Add an event, float [n], at each time to a sound, in place; what is beyond its end is cut."""
    for time in times:
        start = int(time * SAMPLE_RATE)
        event = make_event()[: max(0, len(sound) - start)]
        sound[start:start + len(event)] += event


def crackle(rng, loudness: float, decay: float = 0.004) -> np.ndarray:
    """A burst of noise that decays by the factor e in `decay` seconds."""
    n = int(6 * decay * SAMPLE_RATE)
    return loudness * rng.standard_normal(n) * np.exp(-np.arange(n) / (decay * SAMPLE_RATE))


def ring(frequency: float, loudness: float, decay: float, rise: float = 0.0) -> np.ndarray:
    """A damped sine; its frequency in Hz rises by the fraction `rise` in each `decay` seconds."""
    n = int(6 * decay * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    phase = 2 * np.pi * frequency * (t + rise * t ** 2 / (2 * decay))
    return loudness * np.sin(phase) * np.exp(-t / decay)


# ------------------------------------------------------------------------------------ the sounds
# Each function adds the sound of a way of cooking to `sound`, float64 [N], in place.


def _stir_fry(rng, sound, seconds):
    sound += 0.10 * make_noise(rng, len(sound), 2000, 6500)
    add_events(sound, random_times(rng, seconds, 25), lambda: crackle(rng, rng.uniform(0.1, 0.5)))
    pitch = rng.uniform(900, 1300)
    add_events(sound, regular_times(rng, seconds, 1.6), lambda: ring(pitch, 0.35, 0.03))


def _soup(rng, sound, seconds):
    add_events(
        sound, random_times(rng, seconds, 14),
        lambda: ring(rng.uniform(350, 900), rng.uniform(0.1, 0.4), 0.025, rise=0.3),
    )


def _steam(rng, sound, seconds):
    t = np.arange(len(sound)) / SAMPLE_RATE
    swell = 1 + 0.6 * np.sin(2 * np.pi * (rng.uniform(0.3, 0.8) * t + rng.random()))
    sound += 0.12 * swell * make_noise(rng, len(sound), 4500, 7800)


def _clay_pot(rng, sound, seconds):
    sound += 0.08 * make_noise(rng, len(sound), 40, 180)
    add_events(
        sound, random_times(rng, seconds, 5),
        lambda: ring(rng.uniform(110, 260), rng.uniform(0.2, 0.5), 0.06, rise=0.2),
    )


def _cold_dish(rng, sound, seconds):
    pitch = rng.uniform(180, 280)

    def chop():
        knock = ring(pitch, 0.5, 0.015)
        click = crackle(rng, 0.3, 0.002)
        knock[: len(click)] += click
        return knock

    add_events(sound, regular_times(rng, seconds, rng.uniform(4, 6)), chop)


def _iron_plate(rng, sound, seconds):
    fading = np.exp(-np.arange(len(sound)) / (0.7 * seconds * SAMPLE_RATE))
    add_events(sound, random_times(rng, seconds, 160), lambda: crackle(rng, rng.uniform(0.1, 0.4)))
    sound += 0.06 * make_noise(rng, len(sound), 1000, 7500)
    sound *= fading


def _noodles(rng, sound, seconds):
    sound += 0.08 * make_noise(rng, len(sound), 500, 1600)
    add_events(
        sound, regular_times(rng, seconds, rng.uniform(1.5, 2.2)),
        lambda: crackle(rng, 0.5, 0.02) + ring(90, 0.5, 0.02),
    )


def _over_rice(rng, sound, seconds):
    pitch = rng.uniform(1900, 2500)

    def clink():
        return sum(ring(pitch * ratio, 0.25 / ratio, 0.08) for ratio in (1, 1.62, 2.41))

    add_events(sound, regular_times(rng, seconds, rng.uniform(2, 3.5)), clink)


SOUNDS = {
    "炒": _stir_fry, "汤": _soup, "蒸": _steam, "砂锅": _clay_pot,
    "凉拌": _cold_dish, "铁板": _iron_plate, "面": _noodles, "盖饭": _over_rice,
}


def cook_sound(way: str, seconds: float = SECONDS, seed: int = 0) -> np.ndarray:
    """Synthesise the sound of a way of cooking: float32 [N].

    way: a key of SOUNDS. seconds: its length. seed: another seed gives another variation.

    The loudness varies by a factor of 4, and there is a faint noise of the room. Raises ValueError
    for an unknown way, and unless seconds is above 0.
    """
    if way not in SOUNDS:
        raise ValueError(f"a way of cooking is one of {'、'.join(SOUNDS)}, not {way!r}")
    if not seconds > 0:
        raise ValueError(f"a sound is longer than 0 seconds, not {seconds}")
    rng = np.random.default_rng([seed, zlib.crc32(way.encode())])
    sound = np.zeros(max(1, round(seconds * SAMPLE_RATE)))
    SOUNDS[way](rng, sound, seconds)
    sound *= rng.uniform(0.25, 1)
    sound += rng.uniform(0.0005, 0.003) * rng.standard_normal(len(sound))
    return sound.clip(-1, 1).astype(np.float32)


# ------------------------------------------------------------------------------------ dataset


class Cooking(torch.utils.data.Dataset):
    """Item i is (image, (sound float [N], ingredients)): how the dish is cooked is only heard.

    dishes: a dataset of (image, name) of drawn dishes.
    seconds: length of the sounds.
    seed: another seed gives other variations of the sounds.

    The captions of a batch are a list of such pairs, which `collate` makes.
    """

    def __init__(self, dishes, seconds: float = SECONDS, seed: int = 0):
        self.dishes = dishes
        self.seconds = seconds
        self.seed = seed

    def __len__(self):
        return len(self.dishes)

    def __getitem__(self, index):
        image, name = self.dishes[index]
        ingredients, way = attributes(name)
        sound = cook_sound(way, self.seconds, self.seed * 1_000_003 + index)
        return image, (torch.from_numpy(sound), "".join(ingredients))

    collate = staticmethod(collate_captions)
