"""Sounds of cooking: reproducible, varied, different for each way; films that follow a sound."""

import numpy as np
import pytest
import torch

from datasets.dish_scene import WAYS
from datasets.dish_sounds import (
    FPS,
    SAMPLE_RATE,
    SOUNDS,
    BeatFilms,
    Cooking,
    beats,
    cook_sound,
    draw_beat_film,
)
from datasets.dishes import Dishes, attributes


def test_every_way_of_cooking_has_a_sound():
    assert set(SOUNDS) == set(WAYS)


@pytest.mark.parametrize("way", SOUNDS)
def test_a_sound_is_reproducible_and_varies(way):
    sound = cook_sound(way, seconds=1.0, seed=3)
    assert sound.shape == (SAMPLE_RATE,) and sound.dtype == np.float32
    assert np.array_equal(sound, cook_sound(way, seconds=1.0, seed=3))
    assert not np.array_equal(sound, cook_sound(way, seconds=1.0, seed=4))
    assert np.abs(sound).max() <= 1 and sound.std() > 0.003


def test_a_sound_may_be_shorter_than_its_events():
    for way in SOUNDS:
        assert cook_sound(way, seconds=0.01).shape == (160,)


def test_what_cannot_be_synthesised_is_refused():
    with pytest.raises(ValueError, match="not '烤'"):
        cook_sound("烤")
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="longer than 0"):
            cook_sound("炒", seconds)


def test_the_nearest_mean_spectrum_names_the_way():
    """The ways differ in their spectra: most sounds are nearest to the mean of their own way."""
    def spectrum(way, seed):
        power = np.abs(np.fft.rfft(cook_sound(way, 1.0, seed))) ** 2
        bands = [part.mean() for part in np.array_split(power, 40)]
        logs = np.log(np.array(bands) + 1e-9)
        return logs - logs.mean()

    means = {way: np.mean([spectrum(way, seed) for seed in range(6)], axis=0) for way in SOUNDS}
    correct = 0
    for way in SOUNDS:
        for seed in range(100, 106):
            own = spectrum(way, seed)
            nearest = min(means, key=lambda other: np.square(own - means[other]).sum())
            correct += nearest == way
    assert correct / (6 * len(SOUNDS)) > 0.75           # 0.125 by guessing


def test_a_dataset_gives_images_sounds_and_the_ingredients_alone():
    dishes = Dishes(4, 32)
    dataset = Cooking(dishes, seconds=0.5)
    image, (sound, ingredients) = dataset[1]
    expected, name = dishes[1]
    assert torch.equal(image, expected)
    assert ingredients == "".join(attributes(name).ingredients)
    assert torch.equal(sound, dataset[1][1][0]) and sound.shape == (SAMPLE_RATE // 2,)
    images, captions = Cooking.collate([dataset[i] for i in range(4)])
    assert images.shape == (4, 3, 32, 32) and len(captions) == 4


def test_a_film_hops_exactly_where_its_sound_crackles():
    dataset = BeatFilms(12, 32)
    for i in range(12):
        name, film = dataset.draw(i)
        assert attributes(name).way == "炒"
        assert film.frames.shape == (8, 3, 32, 32) and film.sound.shape == (8 * SAMPLE_RATE // FPS,)
        assert 1 <= film.is_tossed.sum() <= 3
        assert not (film.is_tossed & np.roll(film.is_tossed, 1)).any()
        assert np.array_equal(beats(film.sound, 8) > 0.5, film.is_tossed)
        # The frames without a toss are equal, the others are not.
        still = film.frames[~film.is_tossed]
        assert (still == still[:1]).all()
        assert all((frame != still[0]).mean() > 0.02 for frame in film.frames[film.is_tossed])


@pytest.mark.parametrize("frames", range(4, 13))
def test_the_beats_of_films_of_any_length_are_found(frames):
    films = [draw_beat_film("番茄炒鸡蛋", 32, seed, frames) for seed in range(20)]
    for film in films:
        assert 1 <= film.is_tossed.sum() < frames / 2
        assert np.array_equal(beats(film.sound, frames) > 0.5, film.is_tossed)


def test_a_film_is_reproducible_and_refuses_a_wrong_index():
    dataset = BeatFilms(3, 32, seed=5)
    frames, (name, beat) = dataset[2]
    again, (same_name, same_beat) = BeatFilms(3, 32, seed=5)[2]
    assert torch.equal(frames, again) and name == same_name and torch.equal(beat, same_beat)
    assert frames.shape == (3, 8, 32, 32) and beat.shape == (8,)
    with pytest.raises(IndexError, match="film 3 of 3"):
        dataset[3]
    with pytest.raises(ValueError, match="at least 4"):
        draw_beat_film("番茄炒鸡蛋", 32, frames=3)


def test_silence_and_an_even_sound_have_no_beats():
    assert not beats(np.zeros(8000), 8).any()
    assert not (beats(np.random.default_rng(0).standard_normal(16000), 8) > 0.2).any()
    with pytest.raises(ValueError, match="3 samples is too short for 8"):
        beats(np.zeros(3), 8)
