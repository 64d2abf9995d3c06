import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_repaint import RePaintScheduler

from easy_diffusion.inpaint import painter, repaint, repaint_levels
from easy_diffusion.samplers import Prediction, spaced_timesteps
from easy_diffusion.schedule import NoiseSchedule


@pytest.mark.parametrize("steps, jump, resamples", [(250, 10, 10), (50, 5, 4), (20, 10, 2), (10, 20, 3), (30, 1, 1)])
def test_the_walk_equals_diffusers(steps, jump, resamples):
    scheduler = RePaintScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps, jump, resamples)
    levels = repaint_levels(steps, jump, resamples)
    assert levels[-1] == -1
    assert [level * (1000 // steps) for level in levels[:-1]] == scheduler.timesteps.tolist()


def test_a_short_walk_written_out():
    # 5 noise levels; at 0 and at 2 it climbs back two levels, once
    assert repaint_levels(5, 2, 2) == [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]


def test_the_denoiser_is_asked_at_the_timestep_of_what_it_sees():
    """After climbing back to level k the picture has the noise of level k, and the denoiser is told so."""
    schedule, asked, noises = NoiseSchedule.cosine(1000), [], []

    def denoise(x, t):                                    # data is the picture 0: x_t is then N(0, noise_t²) and E[x0|x_t] = 0
        asked.append(int(t[0]))
        noises.append(x.std().item() / float(schedule.noise[t[0]]))
        return Prediction(torch.zeros_like(x), x / float(schedule.noise[t[0]]))

    picture, mask = torch.zeros(1, 1, 200, 200), torch.zeros(1, 1, 200, 200, dtype=torch.bool)
    mask[..., 100:] = True
    list(repaint(denoise, schedule, picture, mask, steps=20, jump=4, resamples=3, generator=torch.Generator().manual_seed(0)))
    levels = repaint_levels(20, 4, 3)
    timesteps = spaced_timesteps(1000, 20)[::-1]
    assert asked == [timesteps[a] for a, b in zip(levels, levels[1:]) if b < a]
    assert all(abs(ratio - 1) < 0.03 for ratio in noises)                  # 40,000 pixels: standard error 0.0035


def test_what_is_known_comes_back_to_the_bit(toy):
    schedule = NoiseSchedule.cosine(100)
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 5:] = True
    steps = list(repaint(lambda x, t: Prediction(x * 0.5, x), schedule, picture, mask, steps=10, jump=2, resamples=2))
    assert torch.equal(steps[-1].x[..., :5], picture[..., :5])
    assert [step.index for step in steps] == list(range(len(steps)))


def test_the_repainted_half_follows_the_conditional_distribution_of_a_gaussian(gaussian):
    """Data (a, b) is Gaussian with correlation 0.9; a is known. b must come out as N(mean + gain (a - mean), rest)."""
    schedule = NoiseSchedule.cosine(1000)
    mean, covariance = torch.tensor([0.2, -0.1]).double(), torch.tensor([[0.20, 0.18], [0.18, 0.20]]).double()
    picture = torch.tensor([0.7, 0.0]).double().view(1, 2, 1, 1).expand(4000, 2, 1, 1).reshape(4000, 1, 1, 2)
    both = gaussian(mean, covariance, schedule)

    def denoise(x, t):                                    # the fixture speaks of channels, a mask of places
        prediction = both(x.reshape(-1, 2, 1, 1), t)
        return Prediction(prediction.x0.view_as(x), prediction.noise.view_as(x))

    mask = torch.tensor([False, True]).view(1, 1, 1, 2)
    def moments(resamples):
        *_, last = repaint(denoise, schedule, picture, mask, steps=100, jump=5, resamples=resamples,
                           generator=torch.Generator().manual_seed(0))
        b = last.x[..., 1].flatten()
        return b.mean().item(), b.var().item()

    expected_mean, expected_variance = -0.1 + 0.9 * (0.7 - 0.2), 0.20 * (1 - 0.9 ** 2)
    (once, _), (often, variance) = moments(1), moments(20)
    assert abs(often - expected_mean) < 0.03                               # RePaint is approximate; standard error 0.003
    assert abs(often - expected_mean) < 0.5 * abs(once - expected_mean)    # without resampling the halves do not fit
    assert variance == pytest.approx(expected_variance, rel=0.2)


@pytest.mark.parametrize("mask", [
    torch.zeros(1, 1, 8, 9, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool), torch.zeros(1, 1, 8, 8),
    torch.zeros(3, 1, 8, 8, dtype=torch.bool), torch.zeros(1, 3, 8, 8, dtype=torch.bool),
])
def test_a_mask_of_another_form_is_refused(mask):
    with pytest.raises(ValueError, match="a mask is bool"):
        next(repaint(lambda x, t: Prediction(x, x), NoiseSchedule.cosine(10), torch.zeros(2, 3, 8, 8), mask))


def test_a_painter_leaves_what_is_known_to_the_byte_and_can_be_watched():
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    mask = np.zeros((16, 24), dtype=bool)
    mask[:, 20:] = True
    steps = []
    def watch(walk):
        for step in walk:
            steps.append(step)
            yield step
    paint = painter(lambda x, t: Prediction(torch.full_like(x, 0.5), x), NoiseSchedule.cosine(100), steps=6, jump=2, resamples=2,
                    generator=torch.Generator().manual_seed(0), watch=watch)
    painted = paint(picture, mask)
    assert np.array_equal(painted[~mask], picture[~mask]) and painted.dtype == np.uint8
    assert (painted[mask] == round(1.5 * 127.5)).all()                     # the denoiser's 0.5 in [-1, 1]
    levels = repaint_levels(6, 2, 2)
    assert len(steps) == sum(b < a for a, b in zip(levels, levels[1:]))


def test_a_walk_needs_a_jump():
    with pytest.raises(ValueError, match="0"):
        repaint_levels(10, 0, 2)
