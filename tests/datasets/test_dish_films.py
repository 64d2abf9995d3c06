"""Films of drawn dishes: names, loops, and the motion that they state."""

import numpy as np
import pytest
import torch

from datasets.dish_films import (
    HELD_OUT_MOTIONS,
    MOTIONS,
    SPLITS,
    DishFilms,
    draw_film,
    film_names,
    locate,
    move_scene,
    split_film_name,
)
from datasets.dish_scene import WAYS, render_scene
from datasets.dishes import attributes, choose_dish_scene, dish_names, draw_dish

DISH = "铁板牛肉青椒"


def pairs(split):
    names = [split_film_name(name) for name in film_names(split)]
    return {(attributes(dish).way, motion) for motion, dish in names}


def test_no_name_is_in_two_splits_and_all_are_in_one():
    names = [set(film_names(split)) for split in SPLITS]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    all_dishes = len(dish_names("train"))
    assert len(names[0] | names[2]) == all_dishes * len(MOTIONS)


def test_held_out_pairs_of_way_and_motion_are_in_no_training_film():
    assert pairs("held_out_motion") == HELD_OUT_MOTIONS
    assert not pairs("train") & HELD_OUT_MOTIONS
    assert not pairs("held_out") & HELD_OUT_MOTIONS
    assert {motion for _, motion in pairs("train")} == set(MOTIONS)


def test_dishes_of_held_out_films_are_held_out():
    dishes = {split_film_name(name)[1] for name in film_names("held_out")}
    assert dishes <= set(dish_names("held_out"))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_film_is_one_period_so_that_more_frames_lie_between_the_same_ones(motion):
    name = MOTIONS[motion] + DISH
    coarse, fine = (draw_film(name, 32, seed=1, frames=frames) for frames in (4, 8))
    assert np.array_equal(fine.frames[::2], coarse.frames)
    assert fine.frames.shape == (8, 3, 32, 32) and fine.frames.dtype == np.uint8


@pytest.mark.parametrize("motion", MOTIONS)
def test_all_but_still_films_move(motion):
    frames = draw_film(MOTIONS[motion] + DISH, 64, seed=1).frames.astype(int)
    changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert (changes == 0).all() if motion == "still" else (changes > 0.5).all()


@pytest.mark.parametrize("motion", ["turn", "sway", "still"])
def test_the_first_frame_is_the_dish_that_is_drawn_with_the_same_seed(motion):
    first = draw_film(MOTIONS[motion] + DISH, 64, seed=3).frames[0]
    assert np.array_equal(first, draw_dish(DISH, 64, seed=3))


def test_the_plate_turns_by_the_stated_angles():
    film = draw_film("转动" + DISH, 64, seed=2)
    scene = choose_dish_scene(DISH, 2)
    centre = 32 + 64 * np.array(scene.centre)
    arms = film.positions - centre                                  # [F, pieces, 2]
    angles = np.degrees(np.arctan2(arms[..., 1], arms[..., 0]))
    turned = (angles - angles[0]) % 360
    difference = (turned - film.angles[:, None] + 180) % 360 - 180
    assert np.abs(difference).max() < 1e-9
    assert np.allclose(np.hypot(*arms[0].T), np.hypot(*arms[3].T))
    assert film.angles.tolist() == [45.0 * f for f in range(8)]


def test_a_quarter_turn_turns_the_image_of_the_parts_by_90_degrees():
    scene = choose_dish_scene(DISH, 2)._replace(centre=(0.0, 0.0))
    turned, _ = move_scene(scene, "turn", 0.25, [0] * len(scene.pieces))
    before, after = (render_scene(each, 512).parts for each in (scene, turned))
    clockwise = np.rot90(before, k=-1)
    assert (clockwise == after).mean() > 0.98
    assert (before == after).mean() < 0.9


def test_the_light_stays_while_the_plate_turns():
    """A round plate without food looks the same in each frame."""
    scene = choose_dish_scene("番茄炒鸡蛋", 2)._replace(pieces=[])
    turned, _ = move_scene(scene, "turn", 0.125, [])
    difference = render_scene(scene, 64).image.astype(int) - render_scene(turned, 64).image
    assert np.abs(difference).mean() < 0.5


def test_each_piece_hops_once_in_a_period_of_half_its_length():
    film = draw_film("翻炒番茄炒鸡蛋", 32, seed=0, frames=64)
    assert 0 <= film.heights.min() and film.heights.max() <= 1
    assert (film.heights.max(axis=0) > 0.99).all()
    in_the_air = film.heights > 0
    assert np.abs(in_the_air.mean(axis=0) - 0.5).max() < 0.02
    landings = (in_the_air & ~np.roll(in_the_air, -1, axis=0)).sum(axis=0)
    assert (landings == 1).all()


def test_the_positions_belong_to_the_same_piece_in_each_frame():
    film = draw_film("翻炒番茄炒鸡蛋", 32, seed=0)
    assert np.array_equal(film.positions, np.broadcast_to(film.positions[0], film.positions.shape))


def test_steam_makes_the_image_lighter_and_nothing_else_changes():
    film = draw_film("冒汽豆腐牛肉汤", 64, seed=1).frames.astype(int)
    without = draw_dish("豆腐牛肉汤", 64, seed=1).astype(int)
    assert (film >= np.minimum(without, 240)).all()
    assert (film - without).max() > 40
    assert np.abs(film[:, :, -4:] - without[:, -4:]).max() <= 2     # far from the rising steam


def test_a_soup_sways_to_both_sides_of_its_place():
    film = draw_film("晃动豆腐牛肉汤", 64, seed=1)
    offsets = film.positions[:, 0, 0] - film.positions[0, 0, 0]
    assert np.allclose(offsets, offsets[2] * np.sin(2 * np.pi * np.arange(8) / 8), atol=1e-9)
    assert offsets[2] > 1


def test_the_dataset_is_reproducible():
    films = DishFilms(5, 32, "held_out", seed=3, frames=4)
    frames, name = films[2]
    assert frames.shape == (4, 3, 32, 32) and frames.dtype == torch.uint8
    assert name in film_names("held_out")
    again, same_name = DishFilms(5, 32, "held_out", seed=3, frames=4)[2]
    assert torch.equal(frames, again) and name == same_name
    assert len(films) == 5 and len({films.choose(i)[0] for i in range(5)}) > 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: split_film_name("番茄炒鸡蛋"), "begins with 转动、翻炒.*番茄炒鸡蛋"),
        (lambda: split_film_name("转动宫保鸡丁"), "宫保鸡丁"),
        (lambda: draw_film("转动番茄汤", 16), "16"),
        (lambda: draw_film("转动番茄汤", frames=0), "not 0"),
        (lambda: film_names("test"), "'test'"),
        (lambda: DishFilms(3)[3], "film 3 of 3"),
    ],
)
def test_errors_name_what_cannot_be_drawn(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call()


@pytest.mark.parametrize("way", WAYS)
def test_the_positions_are_where_the_pieces_are_drawn(way):
    """Scenes of a single piece: the mean position of its pixels, in images of 256 pixels."""
    name = WAYS[way].name_with_one.format("鸡蛋")
    for seed in range(4):
        scene = choose_dish_scene(name, seed)
        scene = scene._replace(pieces=scene.pieces[:1])
        y, x = np.nonzero(render_scene(scene, 256).parts >= 2)
        position = locate(scene, scene.pieces[0], 256)
        assert np.hypot(x.mean() - position[0], y.mean() - position[1]) < 2
