"""Drawn dishes with a reference image: the same table and vessel, other ingredients."""

import numpy as np
import pytest
import torch

from datasets.dish_references import ReferencedDishes, choose_reference_scene, find_tabletop
from datasets.dish_rendering import TABLETOPS
from datasets.dish_scene import render_scene
from datasets.dishes import Dishes, attributes, choose_dish_scene


def test_the_reference_has_the_table_and_the_vessel_and_other_ingredients():
    name = "番茄炒鸡蛋"
    scene = choose_dish_scene(name, 3)
    for seed in range(5):
        reference = choose_reference_scene(scene, attributes(name).ingredients, seed)
        assert reference._replace(pieces=scene.pieces) == scene
        assert not {p.ingredient for p in reference.pieces} & {"番茄", "鸡蛋"}
    assert choose_reference_scene(scene, (), 1).pieces[0].x != scene.pieces[0].x


@pytest.mark.parametrize("tabletop", range(len(TABLETOPS)))
def test_the_tabletop_is_found(tabletop):
    for seed in range(8):
        scene = choose_dish_scene("土豆牛肉汤", seed)._replace(tabletop=tabletop)
        image = render_scene(scene, 64).image
        assert find_tabletop(image) == tabletop
        noise = np.random.default_rng(seed).normal(0, 8, image.shape)
        assert find_tabletop((image + noise).clip(0, 255).astype(np.uint8)) == tabletop


def test_a_dataset_gives_the_dishes_with_references():
    dataset = ReferencedDishes(6, 32, "held_out", seed=2)
    dishes = Dishes(6, 32, "held_out", seed=2)
    assert len(dataset) == 6
    for i in range(6):
        image, (reference, ingredients) = dataset[i]
        expected, name = dishes[i]
        assert torch.equal(image, expected)
        assert ingredients == "".join(attributes(name).ingredients)
        assert reference.shape == image.shape and reference.dtype == torch.uint8
        assert find_tabletop(reference.numpy()) == find_tabletop(image.numpy())
        assert (reference != image).float().mean() > 0.05
        assert torch.equal(reference, dataset[i][1][0])
    images, captions = dataset.collate([dataset[i] for i in range(6)])
    assert images.shape == (6, 3, 32, 32) and len(captions) == 6
