import pytest
import torch

from easy_diffusion.diffusion.timesteps import (
    ImportanceTimesteps,
    logit_normal_time,
    logit_normal_timesteps,
    uniform_time,
    uniform_timesteps,
)


def test_timesteps_are_in_range_and_follow_their_distribution():
    generator = torch.Generator().manual_seed(0)
    uniform = uniform_timesteps(100_000, 1000, generator)
    logit_normal = logit_normal_timesteps(100_000, 1000, generator)
    for t in (uniform, logit_normal):
        assert t.dtype == torch.int64
        assert t.min() >= 0
        assert t.max() <= 999
    assert uniform.float().mean().item() == pytest.approx(499.5, abs=4)
    # P(1/4 < sigmoid(1.2 z) < 3/4) = P(|z| < ln 3 / 1.2) = 0.640
    in_the_middle = (logit_normal >= 250) & (logit_normal < 750)
    assert in_the_middle.float().mean().item() == pytest.approx(0.640, abs=0.006)


def test_logit_normal_times_are_in_range_and_follow_their_distribution():
    t = logit_normal_time(100_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.003)
    # P(1/4 < sigmoid(z) < 3/4) = P(|z| < ln 3) = 0.728
    in_the_middle = (t > 0.25) & (t < 0.75)
    assert float(in_the_middle.float().mean()) == pytest.approx(0.728, abs=0.005)


@pytest.mark.parametrize("t_min", [1e-3, 0.4])
def test_uniform_times_begin_at_t_min(t_min):
    t = uniform_time(100_000, 1000, torch.Generator().manual_seed(0), t_min=t_min)
    assert t_min <= t.min() < t_min + 1e-4
    assert 1 - 1e-4 < t.max() <= 1
    # standard error: at most 0.0009
    assert float(t.mean()) == pytest.approx((1 + t_min) / 2, abs=0.003)


def test_mean_and_std_of_a_logit_normal_distribution_are_those_of_the_logit():
    def draw(function):
        t = function(100_000, 1000, torch.Generator().manual_seed(0), mean=-1.0, std=0.5)
        return t.double() / (1000 if t.dtype == torch.int64 else 1)

    for t in (draw(logit_normal_time), draw(logit_normal_timesteps)):
        z = torch.logit(t.clamp(1e-4, 1 - 1e-4))
        # standard errors: 0.002 and 0.001; a rounded timestep is 0.003 too small
        assert float(z.mean()) == pytest.approx(-1.0, abs=0.01)
        assert float(z.std()) == pytest.approx(0.5, abs=0.01)


def test_importance_sampling_keeps_the_mean_and_reduces_the_variance():
    # As in the variational bound, a few terms make up most of the sum.
    mean_losses = torch.cat([torch.full((5,), 40.0), torch.full((95,), 0.1)])
    timesteps = ImportanceTimesteps(100, history=5)
    generator = torch.Generator().manual_seed(0)

    def draw_reweighted_losses(batch):
        t = timesteps(batch, 100, generator)
        losses = mean_losses[t] * (1 + 0.1 * torch.randn(batch, generator=generator))
        return timesteps.reweight(t, losses)

    uniform = draw_reweighted_losses(200)
    assert timesteps.probabilities().unique().numel() == 1          # the history is not full yet
    while (timesteps.counts < 5).any():
        draw_reweighted_losses(500)
    weighted = draw_reweighted_losses(20_000)
    assert float(weighted.mean()) == pytest.approx(float(mean_losses.mean()), abs=0.03)
    assert weighted.std() < uniform.std() / 5

    probabilities = timesteps.probabilities()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert probabilities[0] == pytest.approx(40 / mean_losses.sum().item(), rel=0.15)
    with pytest.raises(ValueError, match="not of 1000"):
        timesteps(4, 1000, generator)


def test_importance_sampling_follows_the_root_of_the_second_moment_of_the_last_losses():
    """The means of the last two losses are equal; their second moments are not."""
    timesteps = ImportanceTimesteps(2, history=2)
    for losses in ([100.0, 5.0], [0.0, 5.0], [10.0, 5.0]):      # the first is forgotten
        timesteps.update(torch.tensor([0, 1]), torch.tensor(losses))
    roots = torch.tensor([50.0, 25.0], dtype=torch.float64).sqrt()
    expected = 0.999 * roots / roots.sum() + 0.001 / 2
    torch.testing.assert_close(timesteps.probabilities(), expected, rtol=1e-12, atol=0)
