import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_repaint import RePaintScheduler

from easy_diffusion.animation.camera import uncover
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.samplers import spaced_timesteps
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.inpainting.blending import blend, fill_from_neighbours
from easy_diffusion.inpainting.repaint import make_inpainter, repaint_levels, repaint_sampling


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
        noises.append(x.std().item() / float(schedule.sigma_t[t[0]]))
        return Prediction(torch.zeros_like(x), x / float(schedule.sigma_t[t[0]]))

    picture, mask = torch.zeros(1, 1, 200, 200), torch.zeros(1, 1, 200, 200, dtype=torch.bool)
    mask[..., 100:] = True
    list(repaint_sampling(denoise, schedule, picture, mask, steps=20, jump=4, resamples=3, generator=torch.Generator().manual_seed(0)))
    levels = repaint_levels(20, 4, 3)
    timesteps = spaced_timesteps(1000, 20)[::-1]
    assert asked == [timesteps[a] for a, b in zip(levels, levels[1:]) if b < a]
    assert all(abs(ratio - 1) < 0.03 for ratio in noises)                  # 40,000 pixels: standard error 0.0035


def test_what_is_known_comes_back_to_the_bit():
    schedule = NoiseSchedule.cosine(100)
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 5:] = True
    steps = list(repaint_sampling(lambda x, t: Prediction(x * 0.5, x), schedule, picture, mask, steps=10, jump=2, resamples=2))
    assert torch.equal(steps[-1].x[..., :5], picture[..., :5])
    assert [step.index for step in steps] == list(range(len(steps)))


def test_the_repainted_half_follows_the_conditional_distribution_of_a_gaussian(gaussian):
    """Four pixels with a known covariance; two are known, at two values each. The other two must come out with the conditional mean
    m_u + G (k - m_k), gain G = C_uk C_kk^-1, and covariance C_uu - G C_ku. RePaint comes to it as its jumps become short: of 20, 10 and 5
    in a hundred the mean was wrong by 0.27, 0.15 and 0.08, where the pixels lie 0.25 to 0.29 about it."""
    schedule, pixels = NoiseSchedule.cosine(1000), 4
    mean = torch.tensor([0.2, -0.1, 0.1, 0.0]).double()
    root = torch.tensor([[0.40, 0.0, 0.0, 0.0], [0.25, 0.30, 0.0, 0.0], [0.30, -0.15, 0.25, 0.0], [0.10, 0.30, 0.15, 0.25]]).double()
    covariance = root @ root.T
    both = gaussian(mean, covariance, schedule)
    known = torch.tensor([[0.7, -0.3], [-0.4, 0.3]]).double().repeat_interleave(1500, 0)                   # [3000, 2]
    picture = torch.cat([known, torch.zeros_like(known)], dim=1).view(-1, 1, 1, pixels)

    def denoise(x, t):                                    # the fixture speaks of channels, a mask of places
        prediction = both(x.reshape(-1, pixels, 1, 1), t)
        return Prediction(prediction.x0.view_as(x), prediction.eps.view_as(x))

    gain = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    expected = mean[2:] + (known[[0, -1]] - mean[:2]) @ gain.T                                             # [2 groups, 2]
    rest = covariance[2:, 2:] - gain @ covariance[:2, 2:]
    mask = torch.tensor([False, False, True, True]).view(1, 1, 1, pixels)
    def moments(resamples):
        *_, last = repaint_sampling(denoise, schedule, picture, mask, steps=250, jump=5, resamples=resamples,
                           generator=torch.Generator().manual_seed(0))
        groups = last.x[:, 0, 0, 2:].split(1500)                                                           # [1500, 2] each
        return torch.stack([group.mean(dim=0) for group in groups]), torch.stack([torch.cov(group.T) for group in groups])

    (once, _), (often, spread) = moments(1), moments(15)
    assert (often - expected).abs().max() < 0.05                           # standard error 0.007
    assert (often - expected).abs().max() < 0.15 * (once - expected).abs().max()        # without resampling the halves do not fit
    assert (spread - rest).abs().max() < 0.2 * rest.diagonal().max()       # standard error 0.04 of it


@pytest.mark.parametrize("mask", [
    torch.zeros(1, 1, 8, 9, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool), torch.zeros(1, 1, 8, 8),
    torch.zeros(3, 1, 8, 8, dtype=torch.bool), torch.zeros(1, 3, 8, 8, dtype=torch.bool),
])
def test_a_mask_of_another_form_is_refused(mask):
    with pytest.raises(ValueError, match="a mask is bool"):
        next(repaint_sampling(lambda x, t: Prediction(x, x), NoiseSchedule.cosine(10), torch.zeros(2, 3, 8, 8), mask))


def test_a_painter_leaves_what_is_known_to_the_byte_and_can_be_watched():
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    mask = np.zeros((16, 24), dtype=bool)
    mask[:, 20:] = True
    steps = []
    def progress(walk):
        for step in walk:
            steps.append(step)
            yield step
    known, where = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, torch.from_numpy(mask)
    paint = make_inpainter(lambda x, t: Prediction(torch.where(where, 0.5, known), x), NoiseSchedule.cosine(100), steps=6, jump=2, resamples=2,
                    generator=torch.Generator().manual_seed(0), progress=progress)
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
    assert (fill_from_neighbours(picture, mask) == (200, 100, 50)).all()
    assert (fill_from_neighbours(picture, np.ones((8, 10), bool)) == 127).all() and np.array_equal(fill_from_neighbours(picture, ~(mask | True)), picture)


def decoder_that_darkens(picture, seed):
    """A painter's decoder as outpainting meets it: two levels darker in red, a little brighter in blue, and not exact."""
    noise = np.random.default_rng(seed).normal(0, 4, picture.shape)
    return np.clip(picture + [-2.0, -0.4, 1.0] + noise, 0, 255)


def outpainted(paint, calls=40):
    """For each of the strips that a camera paints on its way to the right, on a wall of one texture: how far its mean is from its own
    texture's, in levels, and its deviation as a share of that one's, [calls, 3] each."""
    texture = np.random.default_rng(0).integers(100, 140, (48, 48, 3), dtype=np.uint8)
    picture, means, spreads = texture, [], []
    for k in range(calls):
        moved, mask = uncover(picture, "right", 12)
        wall = np.where(mask[..., None], np.roll(texture, 5 * k, axis=1), moved)       # a perfect painter's, before it is decoded
        picture = paint(decoder_that_darkens(wall, k), moved, mask)
        means.append((picture[:, -12:].astype(float) - wall[:, -12:]).mean(axis=(0, 1)))
        spreads.append(picture[:, -12:].std(axis=(0, 1)) / wall[:, -12:].std(axis=(0, 1)))
    return np.array(means), np.array(spreads)


def test_what_a_decoder_does_to_colours_is_made_good_at_each_of_40_repaints():
    """The mean of what is painted stays within 1 level of 256 of what it should be (0.2 on average over the repaints, so that nothing adds
    up), its deviation within 15% (the decoder's noise is in it); pasted as it was decoded it is wrong by 2 each time."""
    means, spreads = outpainted(blend)
    assert np.abs(means).max() < 1 and np.abs(means.mean(axis=0)).max() < 0.2
    assert np.abs(spreads - 1).max() < 0.15
    pasted, _ = outpainted(lambda painted, picture, mask: np.where(mask[..., None], painted.round().astype(np.uint8), picture))
    assert np.abs(pasted[:, 0] + 2).max() < 0.5


def test_the_seam_is_closed_and_what_is_known_stays_to_the_byte():
    """A decoder that is wrong by 30 levels on the left and by 10 on the right: at the seam nothing of it is left, far from it the mean."""
    picture, mask = np.full((40, 80, 3), 100, np.uint8), np.zeros((40, 80), bool)
    mask[:, 20:60] = True
    picture[~mask] += np.random.default_rng(0).integers(0, 9, (int((~mask).sum()), 3), dtype=np.uint8)
    painted = np.full((40, 80, 3), 100.0) + np.where(np.arange(80) < 40, -30, -10)[None, :, None] + 4
    joined = blend(painted, picture, mask, width=8)
    assert np.array_equal(joined[~mask], picture[~mask])
    assert abs(joined[:, 20].mean() - 104) < 1.5 and abs(joined[:, 59].mean() - 104) < 1.5
    assert np.abs(np.diff(joined[:, 20:60].astype(int).mean(axis=(0, 2)))[:15]).max() < 2.5        # it fades, without a step
    assert abs(joined[:, 30:36].mean() - (painted[:, 30:36].mean() + 20)) < 1                      # only the mean of both errors
    assert np.array_equal(blend(painted, picture, np.zeros_like(mask)), picture)
    for level, kept in ((258.7, 255), (-3.2, 0), (200.9, 201)):
        assert (blend(np.full(picture.shape, level), picture, np.ones_like(mask)) == kept).all()
    with pytest.raises(ValueError, match=r"\[40, 80, 3\], not \[40, 3\]"):
        blend(painted[:, 0], picture, mask)


def test_painters_name_a_wrong_mask_and_leave_a_picture_without_one_alone():
    def never(x, t):
        raise AssertionError("asked")
    paint, picture = make_inpainter(never, NoiseSchedule.cosine(100)), np.zeros((8, 10, 3), np.uint8)
    assert np.array_equal(paint(picture, np.zeros((8, 10), bool)), picture)
    for wrong in (np.zeros((10, 8), bool), np.zeros((8, 10), np.uint8)):
        with pytest.raises(ValueError, match=r"\[8, 10\]"):
            paint(picture, wrong)
