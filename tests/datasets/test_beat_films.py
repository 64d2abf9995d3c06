"""Films that are tossed to a sound: the hops are where the sound crackles."""

import numpy as np
import pytest
import torch

from datasets.beat_films import BeatFilms, beats, draw_beat_film
from datasets.dish_films import FPS
from datasets.dish_sounds import SAMPLE_RATE
from datasets.dishes import attributes


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
