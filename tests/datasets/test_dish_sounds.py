"""Sounds of cooking: reproducible, varied, different for each way."""

import numpy as np
import pytest
import torch

from datasets.dish_scene import WAYS
from datasets.dish_sounds import SAMPLE_RATE, SOUNDS, Cooking, cook_sound
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
