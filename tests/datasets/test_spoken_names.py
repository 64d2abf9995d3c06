"""Spoken names: reproducible, in several voices; a clear error without espeak-ng."""

import numpy as np
import pytest
import torch

from datasets import spoken_names
from datasets.dishes import Dishes
from datasets.spoken_names import (
    HELD_OUT_VOICE,
    SAMPLE_RATE,
    VOICES,
    SpokenDishes,
    has_speech,
    speak,
    speak_variation,
)

needs_speech = pytest.mark.skipif(not has_speech(), reason="espeak-ng is not installed")


def test_the_held_out_voice_is_not_trained_with():
    assert HELD_OUT_VOICE not in VOICES and len(set(VOICES)) == len(VOICES)


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(spoken_names.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="espeak-ng"):
        speak("番茄汤")


@needs_speech
def test_speech_is_reproducible_and_depends_on_all_its_arguments():
    sound = speak("番茄汤")
    assert sound.dtype == np.float32 and sound.ndim == 1
    assert 0.3 * SAMPLE_RATE < len(sound) < 4 * SAMPLE_RATE
    assert 0.05 < np.abs(sound).max() <= 1.05
    assert np.array_equal(sound, speak("番茄汤"))
    for changes in (dict(text="土豆汤"), dict(voice="m1"), dict(speed=120), dict(pitch=80)):
        other = speak(**dict(text="番茄汤") | changes)
        assert len(other) != len(sound) or not np.allclose(other, sound, atol=1e-3)


@needs_speech
def test_text_is_never_an_option():
    assert len(speak("--version")) > 0


def test_what_cannot_be_said_is_refused():
    with pytest.raises(ValueError, match="'  '"):
        speak("  ")
    for wrong in (dict(voice="x9"), dict(speed=10_000), dict(pitch=-1)):
        with pytest.raises(ValueError, match=str(*wrong.values())):
            speak("番茄汤", **wrong)


@needs_speech
def test_a_dataset_gives_images_and_their_spoken_names():
    dishes = Dishes(4, 32)
    dataset = SpokenDishes(dishes, voices=("f1",))
    image, sound = dataset[1]
    assert torch.equal(image, dishes[1][0])
    expected = speak_variation(dishes[1][1], ("f1",), 1) / 32767
    assert np.abs(sound.numpy() - expected).max() < 1e-6
    images, sounds = dataset.collate([dataset[i] for i in range(4)])
    assert images.shape == (4, 3, 32, 32) and len({len(sound) for sound in sounds}) > 1
