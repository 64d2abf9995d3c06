"""The presets for other conditions: what is trained, what is frozen, and that images follow."""

import numpy as np
import pytest
import torch

from datasets.beat_films import BeatFilms
from datasets.dish_references import ReferencedDishes
from datasets.dish_sounds import Cooking, cook_sound
from datasets.dishes import Dishes
from easy_diffusion.condition_presets import (
    add_audio_encoder,
    add_beats,
    add_image_prompt,
    hear_dishes,
    hear_names,
    train_condition,
)
from easy_diffusion.film_presets import generate_films, inflate_model
from easy_diffusion.generate import generate_images
from easy_diffusion.pretrained import load_model


class Spoken(torch.utils.data.Dataset):
    """Sounds in place of spoken names, so that no speech is needed."""

    collate = staticmethod(Cooking.collate)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Dishes(4, 32)[index][0], torch.from_numpy(cook_sound("汤", 0.3, index))


def add_beats_to_films(model):
    return add_beats(inflate_model(model))


@pytest.mark.parametrize(
    "add, dataset, trained",
    [
        (add_audio_encoder, Cooking(Dishes(4, 32), 0.3), {"encoder.first"}),
        (hear_names, Spoken(), {"encoder"}),
        (add_image_prompt, ReferencedDishes(4, 32), {"network", "encoder.first"}),
        (add_beats_to_films, BeatFilms(4, 32, frames=4), {"network", "encoder"}),
    ],
)
def test_it_trains_what_is_new_and_the_result_can_be_sampled(
    random_weights, tmp_path, add, dataset, trained
):
    model = add(load_model(random_weights, 32))
    parts = torch.nn.ModuleDict({"network": model.network, "encoder": model.encoder})
    before = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
    assert train_condition(model, dataset, 0.01, 2, tmp_path / "c.safetensors") > 0
    moved = {
        name for name, tensor in parts.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved
    assert all(any(name.startswith(part) for part in trained) for name in moved)
    if add is add_image_prompt:
        assert all("_image." in name for name in moved if name.startswith("network"))
    assert not model.network.training and not model.encoder.training

    _, captions = dataset.collate([dataset[i] for i in range(2)])
    if add is add_beats_to_films:
        assert generate_films(model, captions, 4, 32, steps=2).shape == (2, 4, 32, 32, 3)
    else:
        assert generate_images(*model[:3], captions, 32, steps=2).shape == (2, 32, 32, 3)


def test_an_untrained_image_prompt_changes_no_pixel(random_weights):
    model = load_model(random_weights, 32)
    before = generate_images(*model[:3], ["番茄鸡蛋"], 32, steps=2)
    network, encoder, diffusion, _ = add_image_prompt(model)
    _, (reference, _) = ReferencedDishes(4, 32)[0]
    after = generate_images(network, encoder, diffusion, [(reference, "番茄鸡蛋")], 32, steps=2)
    assert np.abs(before.astype(int) - after).max() <= 1


def test_a_film_follows_its_beats(random_weights):
    """Beats change their own frames most, before any training of the motion modules."""
    model = add_beats(inflate_model(load_model(random_weights, 32)))
    torch.nn.init.normal_(model.encoder.beat.weight, std=3.0)
    quiet = torch.zeros(4)
    loud = torch.tensor([0.0, 0.0, 1.0, 0.0])
    a, b = (
        generate_films(model, [("番茄炒鸡蛋", beat)], 4, 32, steps=2, seed=1)[0].astype(int)
        for beat in (quiet, loud)
    )
    changes = np.abs(a - b).mean(axis=(1, 2, 3))
    assert changes[2] > 1 and changes[[0, 1, 3]].max() == 0


def test_the_pairs_of_dishes_hold_their_sound_and_their_ingredients():
    (sound, ingredients), (other, _) = hear_dishes(["番茄炒鸡蛋", "番茄炒鸡蛋"], seed=5)
    assert ingredients == "番茄鸡蛋"
    assert np.array_equal(sound.numpy(), cook_sound("炒", seed=5))
    assert not torch.equal(sound, other)
