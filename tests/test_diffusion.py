import pytest
import torch
from diffusers import DDPMScheduler

from easy_diffusion.diffusion import GaussianDiffusion, logit_normal_timesteps, velocity_weight
from easy_diffusion.schedule import NoiseSchedule
from easy_diffusion.train import uniform_timesteps

SCHEDULES = [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)]


def pictures(seed, b=6):
    return torch.randn(b, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
def test_noising_and_the_velocity_equal_diffusers(schedule):
    scheduler, t = DDPMScheduler(num_train_timesteps=1000), torch.tensor([0, 1, 200, 500, 900, 999])
    scheduler.alphas_cumprod = schedule.alphas_bar
    x0, noise = pictures(0), pictures(1)
    torch.testing.assert_close(GaussianDiffusion(schedule).add_noise(x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-12)
    v = GaussianDiffusion(schedule, "v").target(x0, t, noise)
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["noise", "x0", "v"])
def test_the_right_answer_gives_back_picture_and_noise(schedule, predicts):
    diffusion, t = GaussianDiffusion(schedule, predicts), torch.tensor([0, 1, 200, 500, 900, 998])
    x0, noise = pictures(0), pictures(1)
    prediction = diffusion.prediction(diffusion.target(x0, t, noise), diffusion.add_noise(x0, t, noise), t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-9)       # 1e-16 of rounding over a signal of 1e-4 … 1
    torch.testing.assert_close(prediction.noise, noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_variances_equal_diffusers(schedule, variance):
    scheduler = DDPMScheduler(num_train_timesteps=1000, variance_type=variance)
    scheduler.betas, scheduler.alphas_cumprod = schedule.betas, schedule.alphas_bar
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    diffusion, x, t = GaussianDiffusion(schedule, "v", variance), pictures(0), torch.tensor([1, 2, 200, 500, 900, 999])
    expected = torch.stack([scheduler._get_variance(i) for i in t])
    torch.testing.assert_close(diffusion.prediction(x, x, t).log_variance.exp().flatten(), expected, rtol=1e-9, atol=0)


def test_the_loss_of_each_picture_is_its_own_mean_squared_error():
    diffusion, x0, t = GaussianDiffusion(SCHEDULES[1], "x0"), pictures(0), torch.arange(6) * 150
    loss = diffusion.loss(lambda x, t, c, m: torch.zeros_like(x), x0, t)
    torch.testing.assert_close(loss, x0.float().square().mean(dim=(1, 2, 3)))


def test_the_best_answer_without_looking_has_the_loss_that_theory_gives():
    """For data N(0, I) E[v | x_t] = 0, so L_simple is the variance of v: signal² + noise² = 1."""
    diffusion, g = GaussianDiffusion(SCHEDULES[1], "v"), torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 3, 4, 4, generator=g)
    loss = diffusion.loss(lambda x, t, c, m: torch.zeros_like(x), x0, uniform_timesteps(4000, 1000, g), generator=g)
    assert loss.mean().item() == pytest.approx(1.0, abs=0.02)              # 192,000 numbers: standard error 0.0033


def test_the_velocity_weight_turns_an_error_of_x0_into_the_same_error_of_v():
    schedule, x0, t = SCHEDULES[1], pictures(0), torch.tensor([300, 400, 500, 600, 900, 998])
    def guess(x):
        return torch.tanh(x)
    def the_same_as_v(x, t, c, m):
        signal, noise = schedule.signal_and_noise(t, x)
        return (signal * x - guess(x)) / noise
    asked_x0 = GaussianDiffusion(schedule, "x0", loss_weight=lambda snr: velocity_weight(snr, most=1e9))
    losses = [diffusion.loss(network, x0, t, generator=torch.Generator().manual_seed(1)) for diffusion, network in (
        (asked_x0, lambda x, t, c, m: guess(x)), (GaussianDiffusion(schedule, "v"), the_same_as_v))]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)                 # the error is taken in float32
    assert velocity_weight(torch.tensor([0.0, 1.0, 100.0])).tolist() == [1.0, 2.0, 5.0]


def test_one_caption_serves_many_pictures():
    seen = {}
    def network(x, t, context, mask):
        seen.update(context=context.shape, mask=mask.shape)
        return x
    GaussianDiffusion(SCHEDULES[0]).denoiser(network, torch.zeros(1, 5, 16), torch.ones(1, 5, dtype=torch.bool))(
        torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert seen == {"context": (4, 5, 16), "mask": (4, 5)}


def test_timesteps_lie_in_range_and_where_they_should():
    g = torch.Generator().manual_seed(0)
    uniform, middle = uniform_timesteps(100_000, 1000, g), logit_normal_timesteps(100_000, 1000, g)
    for t in (uniform, middle):
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    assert uniform.float().mean().item() == pytest.approx(499.5, abs=4)
    # P(1/4 < sigmoid(1.2 z) < 3/4) = P(|z| < ln 3 / 1.2) = 0.640
    assert ((middle >= 250) & (middle < 750)).float().mean().item() == pytest.approx(0.640, abs=0.006)


@pytest.mark.parametrize("wrong", [dict(predicts="epsilon"), dict(variance="learned")])
def test_unknown_meanings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=list(wrong.values())[0]):
        GaussianDiffusion(SCHEDULES[0], **wrong)
