import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_repaint import RePaintScheduler

from easy_diffusion.diffusion.prediction import Prediction, eps_from_x0
from easy_diffusion.diffusion.samplers import spaced_timesteps
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.inpainting.repaint import make_inpainter, repaint_levels, repaint_sampling

SETTINGS = [(250, 10, 10), (50, 5, 4), (20, 10, 2), (10, 20, 3), (30, 1, 1)]


@pytest.mark.parametrize("steps, jump, resamples", SETTINGS)
def test_repaint_levels_equal_diffusers(steps, jump, resamples):
    scheduler = RePaintScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps, jump, resamples)
    levels = repaint_levels(steps, jump, resamples)
    assert levels[-1] == -1
    timesteps = [level * (1000 // steps) for level in levels[:-1]]
    assert timesteps == scheduler.timesteps.tolist()


def test_repaint_levels_of_a_short_loop():
    # 5 noise levels; at the levels 0 and 2 it goes back up two levels, once.
    assert repaint_levels(5, 2, 2) == [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]


def denoising_levels(levels):
    """The levels at which the denoiser is called: those before a step down."""
    return [level for level, next_level in zip(levels, levels[1:]) if next_level < level]


def test_the_denoiser_gets_the_timestep_of_the_noise_in_x():
    """After going back up to level k, x has the noise of level k, and the denoiser is called with
    the timestep of level k."""
    schedule = NoiseSchedule.cosine(1000)
    calls, std_ratios = [], []

    def denoise(x, t):
        # The data is the image 0: x_t ~ N(0, sigma_t²) and E[x0 | x_t] = 0.
        sigma_t = float(schedule.sigma_t[t[0]])
        calls.append(int(t[0]))
        std_ratios.append(x.std().item() / sigma_t)
        return Prediction(torch.zeros_like(x), x / sigma_t)

    x0 = torch.zeros(1, 1, 200, 200)
    mask = torch.zeros(1, 1, 200, 200, dtype=torch.bool)
    mask[..., 100:] = True
    generator = torch.Generator().manual_seed(0)
    for _ in repaint_sampling(
        denoise, schedule, x0, mask, steps=20, jump=4, resamples=3, generator=generator
    ):
        pass
    timesteps = spaced_timesteps(1000, 20)[::-1]
    assert calls == [timesteps[level] for level in denoising_levels(repaint_levels(20, 4, 3))]
    # 40,000 pixels: the ratio's standard error is 0.0035.
    assert all(abs(ratio - 1) < 0.03 for ratio in std_ratios)


def test_values_outside_the_mask_are_exactly_those_of_x0():
    schedule = NoiseSchedule.cosine(100)
    x0 = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 5:] = True

    def denoise(x, t):
        return Prediction(x * 0.5, x)

    steps = list(repaint_sampling(denoise, schedule, x0, mask, steps=10, jump=2, resamples=2))
    assert torch.equal(steps[-1].x[..., :5], x0[..., :5])
    assert [step.index for step in steps] == list(range(len(steps)))


def test_inpainted_values_follow_the_conditional_distribution_of_a_gaussian(gaussian):
    """Four pixels with a known covariance C. Two are known, in two groups of samples with other
    values k. The two unknown ones must have the conditional mean m_u + G (k - m_k), with G = C_uk
    C_kk^-1, and the covariance C_uu - G C_ku. RePaint approaches it as its jumps become shorter:
    with jumps of 20, 10 and 5 in 100 steps, the mean was wrong by 0.27, 0.15 and 0.08; the pixels'
    conditional standard deviation is 0.25 to 0.29."""
    schedule = NoiseSchedule.cosine(1000)
    pixels = 4
    mean = torch.tensor([0.2, -0.1, 0.1, 0.0]).double()
    root = torch.tensor([
        [0.40, 0.0, 0.0, 0.0],
        [0.25, 0.30, 0.0, 0.0],
        [0.30, -0.15, 0.25, 0.0],
        [0.10, 0.30, 0.15, 0.25],
    ]).double()
    covariance = root @ root.T
    denoise_channels = gaussian(mean, covariance, schedule)
    known = torch.tensor([[0.7, -0.3], [-0.4, 0.3]]).double()
    known = known.repeat_interleave(1500, 0)                            # [3000, 2]
    x0 = torch.cat([known, torch.zeros_like(known)], dim=1).view(-1, 1, 1, pixels)
    mask = torch.tensor([False, False, True, True]).view(1, 1, 1, pixels)

    def denoise(x, t):
        # The fixture takes the four values as channels, the mask needs them as pixels.
        prediction = denoise_channels(x.reshape(-1, pixels, 1, 1), t)
        return Prediction(prediction.x0.view_as(x), prediction.eps.view_as(x))

    gain = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    expected_mean = mean[2:] + (known[[0, -1]] - mean[:2]) @ gain.T     # [2 groups, 2]
    expected_covariance = covariance[2:, 2:] - gain @ covariance[:2, 2:]

    def sample_moments(resamples):
        generator = torch.Generator().manual_seed(0)
        *_, last = repaint_sampling(
            denoise,
            schedule,
            x0,
            mask,
            steps=250,
            jump=5,
            resamples=resamples,
            generator=generator,
        )
        groups = last.x[:, 0, 0, 2:].split(1500)                        # 2 × [1500, 2]
        means = torch.stack([group.mean(dim=0) for group in groups])
        covariances = torch.stack([torch.cov(group.T) for group in groups])
        return means, covariances

    mean_1, _ = sample_moments(resamples=1)
    mean_15, covariance_15 = sample_moments(resamples=15)
    error_1 = (mean_1 - expected_mean).abs().max()
    error_15 = (mean_15 - expected_mean).abs().max()
    assert error_15 < 0.05                                              # standard error 0.007
    assert error_15 < 0.15 * error_1        # without resampling the regions do not match
    # The covariance has a standard error of 0.04 of the largest variance.
    covariance_error = (covariance_15 - expected_covariance).abs().max()
    assert covariance_error < 0.2 * expected_covariance.diagonal().max()


@pytest.mark.parametrize("mask", [
    torch.zeros(1, 1, 8, 9, dtype=torch.bool),
    torch.zeros(8, 8, dtype=torch.bool),
    torch.zeros(1, 1, 8, 8),
    torch.zeros(3, 1, 8, 8, dtype=torch.bool),
    torch.zeros(1, 3, 8, 8, dtype=torch.bool),
])
def test_a_mask_of_the_wrong_shape_or_dtype_is_refused(mask):
    def denoise(x, t):
        return Prediction(x, x)

    sampling = repaint_sampling(denoise, NoiseSchedule.cosine(10), torch.zeros(2, 3, 8, 8), mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        next(sampling)


def test_an_inpainter_changes_no_pixel_outside_the_mask_and_passes_its_steps_to_progress():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    mask = np.zeros((16, 24), dtype=bool)
    mask[:, 20:] = True
    steps = []

    def progress(sampling):
        for step in sampling:
            steps.append(step)
            yield step

    x0 = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1

    def denoise(x, t):
        return Prediction(torch.where(torch.from_numpy(mask), 0.5, x0), x)

    inpaint = make_inpainter(
        denoise,
        NoiseSchedule.cosine(100),
        steps=6,
        jump=2,
        resamples=2,
        generator=torch.Generator().manual_seed(0),
        progress=progress,
    )
    inpainted = inpaint(image, mask)
    assert np.array_equal(inpainted[~mask], image[~mask])
    assert inpainted.dtype == np.uint8
    assert (inpainted[mask] == round(1.5 * 127.5)).all()                # 0.5 in [-1, 1]
    assert len(steps) == len(denoising_levels(repaint_levels(6, 2, 2)))


def test_a_jump_of_0_is_refused():
    with pytest.raises(ValueError, match="0"):
        repaint_levels(10, 0, 2)


def test_an_inpainter_refuses_a_wrong_mask_and_returns_an_image_with_an_empty_mask_unchanged():
    def denoise(x, t):
        raise AssertionError("the denoiser was called")

    inpaint = make_inpainter(denoise, NoiseSchedule.cosine(100))
    image = np.zeros((8, 10, 3), np.uint8)
    assert np.array_equal(inpaint(image, np.zeros((8, 10), bool)), image)
    for wrong_mask in (np.zeros((10, 8), bool), np.zeros((8, 10), np.uint8)):
        with pytest.raises(ValueError, match=r"\[8, 10\]"):
            inpaint(image, wrong_mask)


def test_a_colour_error_of_the_model_is_corrected_inside_the_mask():
    """It shows where the image is known: the model's prediction covers that, too."""
    schedule = NoiseSchedule.cosine(100)

    def denoise(x_t, t):                                        # 15 levels too dark
        x0 = torch.full_like(x_t, 185 / 127.5 - 1)
        return Prediction(x0, eps_from_x0(x0, x_t, t, schedule))

    image = np.full((24, 32, 3), 200, np.uint8)
    mask = np.zeros((24, 32), bool)
    mask[:, 16:] = True
    result = make_inpainter(denoise, schedule, steps=4, resamples=1)(image, mask)
    assert abs(result.astype(int) - 200).max() <= 1
