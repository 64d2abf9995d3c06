"""The classifier equals Bayes' rule where the optimal denoiser is known, and halving is safe."""

import math

import pytest
import torch

from datasets.dishes import draw_dish
from easy_diffusion.diffusion.flow_matching import RectifiedFlow
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.evaluation.diffusion_classifier import (
    classify,
    draw_noise,
    errors,
    learn_weight,
    rank,
    t_quantile,
    timesteps_at,
)
from easy_diffusion.pretrained import WEIGHTS, load_model

MEANS = torch.tensor([[-0.6, 0.4], [0.4, -0.2], [0.1, 0.5], [-0.2, -0.6]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [
        [[0.30, 0.05], [0.05, 0.20]],
        [[0.10, -0.04], [-0.04, 0.16]],
        [[0.20, 0.00], [0.00, 0.10]],
        [[0.12, 0.06], [0.06, 0.30]],
    ],
    dtype=torch.float64,
)
CAPTIONS = list("甲乙丙丁")


def encode(captions):
    """The context of a caption is its index."""
    index = torch.tensor([CAPTIONS.index(caption) for caption in captions])
    return index[:, None, None], torch.ones(len(captions), 1, dtype=torch.bool)


def optimal_network(diffusion):
    """The optimal output for points [B, 2, 1, 1] of the Gaussian of each row's caption."""
    def network(x_t, t, context, mask):
        t = t / 1000 if isinstance(diffusion, RectifiedFlow) else t
        k = context[:, 0, 0]
        alpha_t, sigma_t = (value[:, :, 0, 0] for value in diffusion.schedule.alpha_sigma(t, x_t))
        x, mean, covariance = x_t[:, :, 0, 0], MEANS[k], COVARIANCES[k]
        c_t = alpha_t[..., None] ** 2 * covariance + sigma_t[..., None] ** 2 * torch.eye(2)
        eps = sigma_t * torch.linalg.solve(c_t, x - alpha_t * mean)         # [B, 2]
        if isinstance(diffusion, GaussianDiffusion):
            return eps[:, :, None, None]
        x0 = (x - sigma_t * eps) / alpha_t
        return (eps - x0)[:, :, None, None]

    return network


FLOW = RectifiedFlow()
GAUSSIAN = GaussianDiffusion(NoiseSchedule.cosine(1000), prediction_type="eps")


def log_density(x):
    """The exact log p(x | c) of each caption."""
    distribution = torch.distributions.MultivariateNormal(MEANS, COVARIANCES)
    return distribution.log_prob(x)                                         # [4]


@pytest.mark.parametrize(
    "diffusion, log_snr, tolerance", [(FLOW, (-12, 12), 0.01), (GAUSSIAN, (-9, 9), 0.15)]
)
@pytest.mark.parametrize("point", [(0.0, 0.1), (0.5, -0.4), (-0.3, 0.2)])
def test_the_scores_differ_as_the_log_densities(diffusion, log_snr, tolerance, point):
    """In nats. The timesteps of a NoiseSchedule are far apart at the smallest noise."""
    x0 = torch.tensor(point, dtype=torch.float64)[:, None, None]
    network = optimal_network(diffusion)
    count = 20_000
    last, = classify(
        network, diffusion, encode, x0, CAPTIONS, rounds=((count, 4),), log_snr=log_snr
    )
    exact = -log_density(x0.flatten())[last.ranking]
    difference = (last.scores - last.scores[0]) - (exact - exact[0])
    assert (difference.abs() < tolerance + 4 * last.standard_errors).all()
    assert last.standard_errors.max() < 0.1
    posterior = (-last.scores).softmax(0)
    torch.testing.assert_close(posterior, (-exact).softmax(0), rtol=0, atol=0.05)


def draw_points(count):
    generator = torch.Generator().manual_seed(1)
    k = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 2, 1, dtype=torch.float64, generator=generator)
    return MEANS[k] + (torch.linalg.cholesky(COVARIANCES[k]) @ noise)[..., 0]


def test_halving_drops_the_best_caption_no_more_often_than_it_says():
    """1,000 points; at a confidence of 0.95 at most 50 may lose the likeliest caption."""
    network = optimal_network(FLOW)
    generator = torch.Generator().manual_seed(0)
    lost, dropped = 0, 0
    for point in draw_points(1000):
        *_, last = classify(
            network, FLOW, encode, point[:, None, None], CAPTIONS, rounds=((8, 1), (16, 1)),
            log_snr=(-8, 8), confidence=0.95, generator=generator,
        )
        lost += int(log_density(point).argmax()) not in last.indices
        dropped += 4 - len(last.indices)
    assert lost <= 50
    assert dropped > 500                        # it does drop captions


def test_the_same_noise_for_all_captions_makes_their_differences_ten_times_as_certain():
    """32 dimensions; the captions differ in the mean of two of them, as in a part of an image."""
    means = torch.zeros(4, 32, 1, 1, dtype=torch.float64)
    means[:, :2, 0, 0] = MEANS

    def network(x_t, t, context, mask):
        alpha_t, sigma_t = FLOW.alpha_sigma(t / 1000, x_t)
        noise = x_t - alpha_t * means[context[:, 0, 0]]
        eps = sigma_t * noise / (0.1 * alpha_t ** 2 + sigma_t ** 2)
        return eps - (x_t - sigma_t * eps) / alpha_t

    context, mask = encode(CAPTIONS)
    x0 = means[0] + 0.1 ** 0.5 * torch.randn(32, 1, 1, generator=torch.Generator().manual_seed(1))
    levels, eps = draw_noise(4000, x0.shape, torch.Generator().manual_seed(0), (-6, 6))
    error = errors(network, FLOW, context, mask, x0, timesteps_at(FLOW, levels), eps.double())
    for wrong in (1, 2, 3):
        shared = (error[0] - error[wrong]).var()
        independent = error[0].var() + error[wrong].var()
        assert independent > 10 * shared


def test_the_learned_weight_is_the_best_for_independent_noise():
    """Margins with means 1, 2, 3 and standard deviations 1, 4, 1: w ∝ mean / variance."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([1.0, 2.0, 3.0])
    std = torch.tensor([1.0, 4.0, 1.0])
    wrong = means + std * torch.randn(500, 40, 3, generator=generator)
    levels = torch.tensor([-2.0, 0.0, 4.0])
    weight = learn_weight(levels, torch.cat([torch.zeros(500, 1, 3), wrong], dim=1))
    expected = (means / std ** 2).double()
    expected = expected / expected.mean()
    torch.testing.assert_close(weight(levels.double()), expected, rtol=0.03, atol=0)
    between = weight(torch.tensor([-1.0, 1.0, 9.0, -5.0], dtype=torch.float64))
    exact = torch.stack([
        expected[:2].mean(), 0.75 * expected[1] + 0.25 * expected[2], expected[2], expected[0]
    ])
    torch.testing.assert_close(between, exact, rtol=0.03, atol=0)


def test_draws_come_in_pairs_and_cover_the_range_evenly():
    levels, eps = draw_noise(101, (2, 3, 3), torch.Generator().manual_seed(0), (-2, 4))
    assert eps.shape == (101, 2, 3, 3)
    torch.testing.assert_close(eps[1::2], -eps[:100:2], rtol=0, atol=0)
    torch.testing.assert_close(levels[1::2], levels[:100:2], rtol=0, atol=0)
    assert levels[0] == 1                       # the middle
    counts = torch.histc(levels[:100:2].float(), 5, -2, 4)
    assert counts.min() >= 9 and counts.max() <= 11


def test_timesteps_have_the_asked_for_noise():
    log_snr = torch.tensor([-4.0, 0.0, 3.0], dtype=torch.float64)
    for diffusion in (FLOW, GAUSSIAN):
        t = timesteps_at(diffusion.schedule, log_snr)
        alpha_t, sigma_t = diffusion.schedule.alpha_sigma(t, log_snr[:, None])
        got = 2 * (alpha_t / sigma_t).log()[:, 0]
        torch.testing.assert_close(got, log_snr, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "probability, freedom, quantile",
    [(0.975, 10, 2.2281), (0.95, 5, 2.0150), (0.99, 7, 2.9980), (0.9999, 23, 4.4152),
     (0.95, 1, 6.3138), (0.9995, 1, 636.62), (0.975, 2, 4.3027), (0.9995, 2, 31.599)],
)
def test_the_t_quantile_is_that_of_the_tables(probability, freedom, quantile):
    assert t_quantile(probability, freedom) == pytest.approx(quantile, rel=5e-3)


def test_rounds_and_captions_are_checked():
    x0 = torch.zeros(2, 1, 1)
    for captions, rounds, message in [
        ([], ((1, 1),), "no caption"),
        (CAPTIONS, ((4, 2), (4, 1)), "must increase"),
        (CAPTIONS, (), "must increase"),
        (CAPTIONS, ((1, 2), (4, 0)), "at least 1 caption"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(classify(optimal_network(FLOW), FLOW, encode, x0, captions, rounds))
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"not {confidence}"):
            list(classify(
                optimal_network(FLOW), FLOW, encode, x0, CAPTIONS, confidence=confidence
            ))


def test_without_confidence_exactly_as_many_remain_as_asked_for():
    x0 = torch.zeros(2, 1, 1, dtype=torch.float64)
    network = optimal_network(FLOW)
    rounds = list(classify(network, FLOW, encode, x0, CAPTIONS, ((1, 3), (4, 2), (9, 1))))
    assert [len(each.ranking) for each in rounds] == [4, 3, 2]
    assert [len(each.indices) for each in rounds] == [3, 2, 1]
    assert rounds[0].standard_errors.isnan().all()
    for each in rounds:
        assert each.indices == each.ranking[:len(each.indices)]
        assert (each.scores.diff() >= 0).all()
        assert math.isclose(float(each.standard_errors[0]), 0) or each.evaluations == 1


def test_the_ranking_has_every_caption_once_and_the_last_round_first():
    x0 = torch.full((2, 1, 1), 0.2, dtype=torch.float64)
    network = optimal_network(FLOW)
    rounds = list(classify(network, FLOW, encode, x0, CAPTIONS, ((1, 3), (4, 2), (9, 1))))
    order = rank(rounds)
    assert sorted(order) == [0, 1, 2, 3]
    assert order[:2] == rounds[2].ranking
    assert order[2] == rounds[1].ranking[2] and order[3] == rounds[0].ranking[3]


def test_the_shipped_network_names_a_dish_that_it_has_never_seen():
    network, encoder, diffusion, _ = load_model(WEIGHTS, 64)
    captions = ["番茄炒鸡蛋", "土豆炒牛肉", "豆腐炒虾仁", "青椒炒香肠", "番茄炒土豆"]
    for name in captions[:2]:
        x0 = torch.from_numpy(draw_dish(name, 64, seed=7)) / 127.5 - 1
        *_, last = classify(network, diffusion, encoder, x0, captions, ((2, 2), (4, 1)))
        assert captions[last.indices[0]] == name
