"""Spoken names of dishes: synthetic speech of espeak-ng, in several voices.

espeak-ng is a program, not a Python package: `apt install espeak-ng` on Debian and Ubuntu, `brew
install espeak-ng` on macOS. Its voices are variants of one rule-based synthesiser. They are no test
of whether a network understands people.

`SpokenDishes` is a dataset of drawn dishes with their spoken names. Speed and pitch vary from name
to name. One voice is held out.

A sound is float32 [N] in [-1, 1], SAMPLE_RATE values a second. The file needs numpy, torch, the
packages soundfile and soxr and, beside it, dish_sounds.py, dishes.py, dish_scene.py,
dish_rendering.py and dish_shapes.py.

>>> sorted(VOICES)[:2], HELD_OUT_VOICE in VOICES
(['f1', 'f2'], False)
"""

import io
import random
import shutil
import subprocess
from functools import lru_cache

import numpy as np
import torch

from .dish_sounds import SAMPLE_RATE
from .dishes import collate_captions

VOICES = ("f1", "f2", "f3", "m1", "m3", "m7")   # variants of espeak-ng: female and male
HELD_OUT_VOICE = "f4"
VARIATIONS = 2          # of each name in training: voice, speed and pitch


def has_speech() -> bool:
    """Whether espeak-ng is installed."""
    return shutil.which("espeak-ng") is not None


def speak(text: str, voice: str = "f2", speed: int = 170, pitch: int = 50) -> np.ndarray:
    """Synthesise Mandarin speech: float32 [N].

    voice: one of VOICES, or HELD_OUT_VOICE. speed: as espeak-ng's option -s, 80 … 450.
    pitch: 0 … 99.

    Raises FileNotFoundError if espeak-ng is not installed, and ValueError for blank text, another
    voice, and a speed or pitch out of range.
    """
    import soundfile
    import soxr

    if not text.strip():
        raise ValueError(f"there is nothing to say in {text!r}")
    if voice not in (*VOICES, HELD_OUT_VOICE):
        raise ValueError(f"voice is one of {', '.join((*VOICES, HELD_OUT_VOICE))}, not {voice!r}")
    if not 80 <= speed <= 450 or not 0 <= pitch <= 99:
        raise ValueError(f"speed is 80 to 450 and pitch 0 to 99, not {speed} and {pitch}")
    if not has_speech():
        raise FileNotFoundError(
            "speech needs the program espeak-ng: apt install espeak-ng, or brew install espeak-ng"
        )
    voice_options = ["-v", f"cmn+{voice}", "-s", str(speed), "-p", str(pitch)]
    done = subprocess.run(
        ["espeak-ng", *voice_options, "-b", "1", "--stdin", "--stdout"],    # -b 1: text is UTF-8
        input=text.encode(), capture_output=True,
    )
    if done.returncode or not done.stdout:
        raise ValueError(f"espeak-ng cannot say {text!r}: {done.stderr.decode(errors='replace')}")
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return soxr.resample(samples, rate, SAMPLE_RATE)


@lru_cache(maxsize=20_000)
def speak_variation(name: str, voices: tuple[str, ...], variation: int) -> np.ndarray:
    """A name in a voice of `voices`, at a speed and a pitch, that follow from the variation.

    int16 [N], in units of 1 / 32767, since many are kept in memory.
    """
    rng = random.Random(f"{name} {variation}")
    sound = speak(name, rng.choice(voices), rng.randint(140, 200), rng.randint(35, 65))
    return (sound.clip(-1, 1) * 32767).astype(np.int16)


class SpokenDishes(torch.utils.data.Dataset):
    """Item i is (image, sound float [N]): a drawn dish and its spoken name.

    dishes: a dataset of (image, name) of drawn dishes.
    voices: item i has one of them, the same at each access.
    """

    def __init__(self, dishes, voices: tuple[str, ...] = VOICES):
        self.dishes = dishes
        self.voices = voices

    def __len__(self):
        return len(self.dishes)

    def __getitem__(self, index):
        image, name = self.dishes[index]
        sound = speak_variation(name, self.voices, index % VARIATIONS)
        return image, torch.from_numpy(sound / np.float32(32767))

    collate = staticmethod(collate_captions)
