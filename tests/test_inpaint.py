import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_repaint import RePaintScheduler

from easy_diffusion.camera import uncover
from easy_diffusion.inpaint import blended, filled, painter, repaint, repaint_levels
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


def test_holes_are_filled_from_their_known_neighbours():
    picture = np.zeros((8, 10, 3), np.uint8)
    picture[:, :5], picture[:, 5:] = (200, 100, 50), 255
    mask = np.zeros((8, 10), bool)
    mask[:, 5:] = True
    assert (filled(picture, mask) == (200, 100, 50)).all()
    assert (filled(picture, np.ones((8, 10), bool)) == 127).all() and np.array_equal(filled(picture, ~(mask | True)), picture)


def decoder_that_darkens(picture, seed):
    """A painter's decoder as outpainting meets it: two levels darker in red, a little brighter in blue, and not exact."""
    noise = np.random.default_rng(seed).normal(0, 4, picture.shape)
    return np.clip(picture + [-2.0, -0.4, 1.0] + noise, 0, 255)


def outpainted(paint, calls=40):
    """The mean and deviation of each of the strips that a camera paints on its way to the right, on a wall of one texture."""
    texture = np.random.default_rng(0).integers(100, 140, (48, 48, 3), dtype=np.uint8)
    picture, strips = texture, []
    for k in range(calls):
        moved, mask = uncover(picture, "right", 12)
        # what a perfect painter would paint next: the same wall, as bright as what it sees
        wall = np.where(mask[..., None], np.roll(texture, 5 * k, axis=1), moved)
        offset = moved[~mask].mean(axis=0) - texture.mean(axis=(0, 1))
        picture = paint(decoder_that_darkens(wall + offset * mask[..., None], k), moved, mask)
        strips.append(picture[:, -12:].astype(float))
    return np.array([strip.mean(axis=(0, 1)) for strip in strips]), np.array([strip.std(axis=(0, 1)) for strip in strips])


def test_colours_do_not_drift_over_40_repaints():
    """The mean of what is painted stays within 4 levels of 256 (the texture's own means differ by as much), and its deviation within
    10%; pasted as it was decoded it loses more than 30."""
    mean, deviation = outpainted(blended)
    assert np.abs(mean - mean[0]).max() < 4
    assert np.abs(deviation / deviation[0] - 1).max() < 0.1
    pasted, _ = outpainted(lambda painted, picture, mask: np.where(mask[..., None], painted.round().astype(np.uint8), picture))
    assert (pasted[0] - pasted[-1])[0] > 30 and (pasted[-1] - pasted[0])[2] > 15


def test_the_seam_is_closed_and_what_is_known_stays_to_the_byte():
    """A decoder that is wrong by 30 levels on the left and by 10 on the right: at the seam nothing of it is left, far from it the mean."""
    picture, mask = np.full((40, 80, 3), 100, np.uint8), np.zeros((40, 80), bool)
    mask[:, 20:60] = True
    picture[~mask] += np.random.default_rng(0).integers(0, 9, (int((~mask).sum()), 3), dtype=np.uint8)
    painted = np.full((40, 80, 3), 100.0) + np.where(np.arange(80) < 40, -30, -10)[None, :, None] + 4
    joined = blended(painted, picture, mask, width=8)
    assert np.array_equal(joined[~mask], picture[~mask])
    assert abs(joined[:, 20].mean() - 104) < 1.5 and abs(joined[:, 59].mean() - 104) < 1.5
    assert np.abs(np.diff(joined[:, 20:60].astype(int).mean(axis=(0, 2)))[:15]).max() < 2.5        # it fades, without a step
    assert abs(joined[:, 30:36].mean() - (painted[:, 30:36].mean() + 20)) < 1                      # only the mean of both errors
    assert np.array_equal(blended(painted, picture, np.zeros_like(mask)), picture)


def test_painters_name_a_wrong_mask_and_leave_a_picture_without_one_alone():
    def never(x, t):
        raise AssertionError("asked")
    paint, picture = painter(never, NoiseSchedule.cosine(100)), np.zeros((8, 10, 3), np.uint8)
    assert np.array_equal(paint(picture, np.zeros((8, 10), bool)), picture)
    for wrong in (np.zeros((10, 8), bool), np.zeros((8, 10), np.uint8)):
        with pytest.raises(ValueError, match=r"\[8, 10\]"):
            paint(picture, wrong)
