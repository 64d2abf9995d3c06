"""Metrics of films, on films whose motion is known."""

import itertools

import pytest
import torch

from datasets.beat_films import BeatFilms
from datasets.dish_films import draw_film
from easy_diffusion.evaluation.film_metrics import (
    MotionClassifier,
    correlate,
    event_f1,
    find_tosses,
    loop_seam_ratio,
    measure_rotation,
    train_motion_classifier,
)


@pytest.mark.parametrize("name", ["转动番茄炒鸡蛋", "转动铁板牛肉青椒", "转动豆腐汤"])
@pytest.mark.parametrize("frames", [8, 5])
def test_the_rotation_of_drawn_films_is_found_within_two_degrees(name, frames):
    film = torch.from_numpy(draw_film(name, 64, seed=3, frames=frames).frames)
    assert (measure_rotation(film) - 360 / frames).abs().max() <= 2


def test_a_film_that_stands_still_is_not_turned_and_one_that_is_reversed_turns_back():
    film = torch.from_numpy(draw_film("转动番茄炒鸡蛋", 64, seed=3).frames)
    assert (measure_rotation(film.flip(0)) + 45).abs().max() <= 2
    still = torch.from_numpy(draw_film("静止番茄炒鸡蛋", 64, seed=3).frames)
    assert measure_rotation(still).tolist() == [0] * 8


def test_the_largest_correlation_is_at_the_shift():
    a = torch.randn(2, 4, 360, generator=torch.Generator().manual_seed(0))
    correlation = correlate(a, a.roll(30, dims=2))
    assert correlation.argmax(dim=1).tolist() == [30, 30]
    torch.testing.assert_close(correlation[:, 30], torch.ones(2))


def test_the_seam_of_a_loop_is_one_and_that_of_a_ramp_is_not():
    phases = torch.arange(8) / 8 * 2 * torch.pi
    grey = torch.stack([phases.cos(), phases.sin(), phases.sin()], dim=1)       # [F, 3]
    loop = (128 + 100 * grey)[:, :, None, None].expand(8, 3, 8, 8).round().byte()
    assert 0.5 < float(loop_seam_ratio(loop[None])) < 1.5
    ramp = (10 * torch.arange(8))[:, None, None, None].expand(8, 3, 8, 8).byte()
    assert float(loop_seam_ratio(ramp[None])) == pytest.approx(7)
    assert loop_seam_ratio(torch.stack([loop, ramp])).shape == (2,)


def test_films_of_turning_plates_loop_and_half_a_turn_does_not():
    whole = torch.from_numpy(draw_film("转动番茄炒鸡蛋", 64, seed=0, frames=24).frames)
    assert float(loop_seam_ratio(whole[None])) == pytest.approx(1, abs=0.1)
    assert float(loop_seam_ratio(whole[None, :12])) > 1.15


def test_a_classifier_learns_what_moves():
    torch.manual_seed(0)
    kinds = ["still", "turn"]

    def make(seed):
        film = draw_film("转动番茄炒鸡蛋", 32, seed).frames
        return torch.from_numpy(film if seed % 2 else film[:1].repeat(8, axis=0)), kinds[seed % 2]

    films, names = zip(*(make(seed) for seed in range(16)))
    films = torch.stack(films)
    classifier = MotionClassifier(kinds, width=8)
    for _ in train_motion_classifier(classifier, [(films[:12], names[:12])], steps=30):
        pass
    assert classifier.classify(films[12:]) == list(names[12:])


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        next(train_motion_classifier(MotionClassifier(["turn"], width=8), []))


def test_losses_are_yielded_one_by_one():
    films = torch.zeros(2, 2, 3, 16, 16, dtype=torch.uint8)
    losses = train_motion_classifier(MotionClassifier(["a", "b"], 8), [(films, ["a", "b"])], 5)
    assert len(list(itertools.islice(losses, 3))) == 3


def test_the_tosses_of_drawn_films_are_found_also_in_noise():
    generator = torch.Generator().manual_seed(0)
    films, tosses = [], []
    for i in range(10):
        _, film = BeatFilms(10, 32).draw(i)
        films.append(torch.from_numpy(film.frames))
        tosses.append(torch.from_numpy(film.is_tossed))
    films, tosses = torch.stack(films), torch.stack(tosses)
    assert torch.equal(find_tosses(films), tosses)
    noise = 6 * torch.randn(films.shape, generator=generator)
    assert torch.equal(find_tosses((films + noise).clamp(0, 255).to(torch.uint8)), tosses)


def test_the_f1_of_events_is_that_of_precision_and_recall():
    found = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    true = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert event_f1(found, true) == pytest.approx(expected)
    assert event_f1(true, true) == event_f1(~true & true, ~true & true) == 1
    assert event_f1(found, ~found) == 0
