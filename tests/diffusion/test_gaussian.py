import functools

import pytest
import torch
from diffusers import DDPMScheduler

from easy_diffusion.diffusion.gaussian import (
    GaussianDiffusion,
    min_snr_weight,
    velocity_weight,
)
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.timesteps import uniform_timesteps

LINEAR = NoiseSchedule.linear(1000)
COSINE = NoiseSchedule.cosine(1000)
both_schedules = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
all_prediction_types = pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])


def random_images(seed, batch=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)


def predict_zero(x_t, t, context, mask):
    return torch.zeros_like(x_t)


# ---------------------------------------------------------------- prediction types


@both_schedules
def test_add_noise_and_v_equal_diffusers(schedule):
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    scheduler.alphas_cumprod = schedule.alpha_bar
    t = torch.tensor([0, 1, 200, 500, 900, 999])
    x0, eps = random_images(0), random_images(1)
    x_t = GaussianDiffusion(schedule).add_noise(x0, t, eps)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, t), rtol=0, atol=1e-12)
    v = GaussianDiffusion(schedule, "v").target(x0, t, eps)
    torch.testing.assert_close(v, scheduler.get_velocity(x0, eps, t), rtol=0, atol=1e-12)


@both_schedules
@all_prediction_types
def test_a_perfect_output_reconstructs_x0_and_eps(schedule, prediction_type):
    diffusion = GaussianDiffusion(schedule, prediction_type)
    t = torch.tensor([0, 1, 200, 500, 900, 998])
    x0, eps = random_images(0), random_images(1)
    x_t = diffusion.add_noise(x0, t, eps)
    prediction = diffusion.to_prediction(diffusion.target(x0, t, eps), x_t, t)
    # Rounding errors of 1e-16 are divided by an alpha_t of 1e-4 … 1.
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-9)


@both_schedules
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_variances_equal_diffusers(schedule, variance):
    scheduler = DDPMScheduler(num_train_timesteps=1000, variance_type=variance)
    scheduler.betas = schedule.betas
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    diffusion = GaussianDiffusion(schedule, "v", variance)
    x, t = random_images(0), torch.tensor([1, 2, 200, 500, 900, 999])
    expected = torch.stack([scheduler._get_variance(i) for i in t])
    log_variance = diffusion.to_prediction(x, x, t).log_variance
    torch.testing.assert_close(log_variance.exp().flatten(), expected, rtol=1e-9, atol=0)


def test_a_single_caption_is_used_for_every_image():
    shapes = {}

    def network(x, t, context, mask):
        shapes.update(context=context.shape, mask=mask.shape)
        return x

    context, mask = torch.zeros(1, 5, 16), torch.ones(1, 5, dtype=torch.bool)
    denoise = GaussianDiffusion(LINEAR).denoiser(network, context, mask)
    denoise(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert shapes == {"context": (4, 5, 16), "mask": (4, 5)}


@pytest.mark.parametrize("wrong", [dict(prediction_type="epsilon"), dict(variance="learned")])
def test_an_unknown_prediction_type_or_variance_is_named(wrong):
    value, = wrong.values()
    with pytest.raises(ValueError, match=f"not '{value}'"):
        GaussianDiffusion(LINEAR, **wrong)


def test_a_wrong_channel_count_timestep_or_schedule_is_named():
    x = random_images(0)

    def three_channels(x_t, t, context, mask):
        return x_t

    def one_channel(x_t, t, context, mask):
        return x_t[:, :1]

    for variance, network, message in (
        ("learned_range", three_channels, r"not \(6, 3, .*: 6 output channels"),
        ("fixed_small", one_channel, r"not \(6, 1, .*: 3 output channels"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianDiffusion(LINEAR, variance=variance).loss(network, x, torch.arange(6))

    for t in (0.5, -1, 1000):
        with pytest.raises(ValueError, match="integers from 0 to 999"):
            GaussianDiffusion(LINEAR).loss(three_channels, x, torch.tensor([t] * 6))

    with pytest.raises(ValueError, match="pure noise"):
        GaussianDiffusion(NoiseSchedule.jsd(10), "eps")
    GaussianDiffusion(NoiseSchedule.jsd(10), "v")
    assert GaussianDiffusion(NoiseSchedule([0.5])).log_beta_tilde.values.isfinite().all()


# ---------------------------------------------------------------- losses


def test_the_loss_is_the_mean_squared_error_of_each_image():
    diffusion, x0 = GaussianDiffusion(COSINE, "x0"), random_images(0)
    loss = diffusion.loss(predict_zero, x0, torch.arange(6) * 150)
    torch.testing.assert_close(loss, x0.float().square().mean(dim=(1, 2, 3)))


def test_the_smallest_loss_of_v_for_standard_normal_data_is_1():
    """For data N(0, I) E[v | x_t] = 0, so L_simple is the variance of v, alpha_t² + sigma_t²."""
    diffusion, generator = GaussianDiffusion(COSINE, "v"), torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 3, 4, 4, generator=generator)
    t = uniform_timesteps(4000, 1000, generator)
    loss = diffusion.loss(predict_zero, x0, t, generator=generator)
    # 192,000 values: standard error 0.0033
    assert loss.mean().item() == pytest.approx(1.0, abs=0.02)


@all_prediction_types
def test_the_loss_is_zero_for_the_eps_in_x_t_only(prediction_type):
    x0, t = random_images(0), torch.tensor([5, 100, 300, 600, 900, 998])
    diffusion = GaussianDiffusion(COSINE, prediction_type)

    def perfect(x_t, t, context, mask):
        alpha_t, sigma_t = COSINE.alpha_sigma(t, x_t)
        return diffusion.target(x0, t, (x_t - alpha_t * x0) / sigma_t)

    def off_by_a_half(x_t, t, context, mask):
        return perfect(x_t, t, context, mask) + 0.5

    loss = diffusion.loss(perfect, x0, t, generator=torch.Generator().manual_seed(3))
    assert loss.max() < 1e-12
    loss = diffusion.loss(off_by_a_half, x0, t)
    assert loss.allclose(torch.tensor(0.25, dtype=torch.float32))


def test_the_velocity_weight_turns_the_loss_of_x0_into_the_loss_of_v():
    x0, t = random_images(0), torch.tensor([300, 400, 500, 600, 900, 998])

    def predict_x0(x_t, t, context, mask):
        return torch.tanh(x_t)

    def predict_v(x_t, t, context, mask):
        alpha_t, sigma_t = COSINE.alpha_sigma(t, x_t)
        return (alpha_t * x_t - torch.tanh(x_t)) / sigma_t

    unlimited = functools.partial(velocity_weight, max_weight=1e9)
    weighted = GaussianDiffusion(COSINE, "x0", loss_weight=unlimited)
    loss_x0 = weighted.loss(predict_x0, x0, t, generator=torch.Generator().manual_seed(1))
    diffusion_v = GaussianDiffusion(COSINE, "v")
    loss_v = diffusion_v.loss(predict_v, x0, t, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss_x0, loss_v, rtol=1e-5, atol=0)      # float32 errors

    assert velocity_weight(torch.tensor([0.0, 1.0, 100.0]), "x0").tolist() == [1.0, 2.0, 5.0]
    assert velocity_weight(torch.tensor([0.0, 1.0, 4.0]), "v").tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_gives_the_same_loss_for_every_prediction_type(gamma):
    x0, t = random_images(0), torch.tensor([100, 300, 400, 500, 600, 900])

    def compute_loss(prediction_type, loss_weight):
        diffusion = GaussianDiffusion(COSINE, prediction_type, loss_weight=loss_weight)

        def network(x_t, t, context, mask):
            predicted_x0 = torch.tanh(x_t)
            alpha_t, sigma_t = COSINE.alpha_sigma(t, x_t)
            predicted_eps = (x_t - alpha_t * predicted_x0) / sigma_t
            return diffusion.target(predicted_x0, t, predicted_eps)

        return diffusion.loss(network, x0, t, generator=torch.Generator().manual_seed(1))

    snr = (COSINE.alpha_bar / (1 - COSINE.alpha_bar))[t]
    expected = snr.clamp(max=gamma).float() * compute_loss("x0", None)
    for prediction_type in ("eps", "x0", "v"):
        weight = functools.partial(min_snr_weight, gamma=gamma)
        torch.testing.assert_close(
            compute_loss(prediction_type, weight), expected, rtol=1e-5, atol=0
        )


def test_min_snr_weights_equal_the_published_values():
    snr = torch.tensor([0.1, 1.0, 100.0], dtype=torch.float64)
    for prediction_type, expected in (
        ("x0", [0.1, 1, 5]),
        ("eps", [1, 1, 0.05]),
        ("v", [0.1 / 1.1, 0.5, 5 / 101]),
    ):
        weight = min_snr_weight(snr, prediction_type)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
