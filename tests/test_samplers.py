import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from easy_diffusion.diffusion import GaussianDiffusion
from easy_diffusion.samplers import Prediction, clipped, ddim, ddpm, guided, spaced_timesteps
from easy_diffusion.schedule import NoiseSchedule

MEANING = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACING = {"uniform": "leading", "trailing": "trailing"}


def theirs(kind, schedule, **options):
    """diffusers' scheduler, its float32 tables replaced by the float64 ones of the same schedule."""
    scheduler = kind(num_train_timesteps=len(schedule), clip_sample=False, **options)
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.betas, 1 - schedule.betas, schedule.alphas_bar
    scheduler.one, scheduler.final_alpha_cumprod = (torch.tensor(1.0, dtype=torch.float64),) * 2
    return scheduler


def start():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["noise", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps, spacing", [(1000, "uniform"), (50, "uniform"), (25, "trailing")])
def test_ddpm_trajectory_equals_diffusers(toy, schedule, predicts, variance, steps, spacing):
    scheduler = theirs(DDPMScheduler, schedule, prediction_type=MEANING[predicts], variance_type=variance,
                       timestep_spacing=SPACING[spacing])
    scheduler.set_timesteps(steps)
    x, generator = start(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, predicts, variance).denoiser(toy)
    ours = ddpm(denoise, schedule, steps=steps, spacing=spacing, generator=torch.Generator().manual_seed(2), x_T=x)
    for t, step in zip(scheduler.timesteps, ours, strict=True):
        x = scheduler.step(toy(x, t.expand(2)), t, x, generator=generator).prev_sample
        assert step.t == t
        if spacing == "trailing" and variance == "fixed_large" and t == scheduler.timesteps[-1]:
            break       # there diffusers adds the noise of a step to t > 0 to its last picture; ours ends at the mean
        # relative: a first step of cosine divides by a signal of 5e-5, so that values of 1e4 occur
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["noise", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps, spacing", [(250, "uniform"), (50, "uniform"), (7, "uniform"), (20, "trailing")])
def test_ddim_trajectory_equals_diffusers(toy, schedule, predicts, eta, steps, spacing):
    scheduler = theirs(DDIMScheduler, schedule, prediction_type=MEANING[predicts], timestep_spacing=SPACING[spacing])
    scheduler.set_timesteps(steps)
    x, generator = start(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, predicts).denoiser(toy)
    ours = ddim(denoise, schedule, steps=steps, eta=eta, spacing=spacing, generator=torch.Generator().manual_seed(2), x_T=x)
    for t, step in zip(scheduler.timesteps, ours, strict=True):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = scheduler.step(toy(x, t.expand(2)), t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


def test_clipping_equals_diffusers(toy):
    schedule = NoiseSchedule.cosine(1000)
    scheduler = theirs(DDIMScheduler, schedule, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.register_to_config(clip_sample=True, clip_sample_range=1.0)
    scheduler.set_timesteps(20)
    x = start()
    denoise = clipped(GaussianDiffusion(schedule, "v").denoiser(toy), schedule)
    for t, step in zip(scheduler.timesteps, ddim(denoise, schedule, steps=20, x_T=x), strict=True):
        x = scheduler.step(toy(x, t.expand(2)), t, x, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)
        assert step.x0.abs().max() <= 1


@pytest.mark.parametrize("steps", [1000, 40])
def test_ddim_with_eta_1_is_ddpm(toy, steps):
    schedule, x = NoiseSchedule.linear(1000), start()
    denoise = GaussianDiffusion(schedule, "v", "fixed_small").denoiser(toy)
    runs = [list(sampler(denoise, schedule, steps=steps, x_T=x, generator=torch.Generator().manual_seed(5), **more))
            for sampler, more in ((ddpm, {}), (ddim, {"eta": 1.0}))]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-9)


def test_ddpm_and_ddim_reach_the_mean_and_covariance_of_a_gaussian(gaussian):
    schedule = NoiseSchedule.cosine(1000)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    covariance = torch.tensor([[0.30, 0.12], [0.12, 0.10]], dtype=torch.float64)
    denoise = gaussian(mean, covariance, schedule)
    for sampler, steps in ((ddpm, 500), (ddim, 200)):
        *_, last = sampler(denoise, schedule, (40_000, 2, 1, 1), steps=steps, dtype=torch.float64,
                           generator=torch.Generator().manual_seed(0))
        x = last.x.flatten(1)
        # 40,000 samples: a standard error of 0.003 in the mean and 0.002 in the covariance
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.012)
        torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.01)


def test_guidance_mixes_the_noise_by_its_formula_and_x0_with_it():
    schedule, x, t = NoiseSchedule.cosine(1000), start(), torch.tensor([400, 400])
    diffusion = GaussianDiffusion(schedule, "v")
    text = diffusion.denoiser(lambda x, t, c, m: torch.sin(x))
    nothing = diffusion.denoiser(lambda x, t, c, m: torch.cos(x))
    a, b, g = text(x, t), nothing(x, t), guided(text, nothing, scale=3.5)(x, t)
    torch.testing.assert_close(g.noise, b.noise + 3.5 * (a.noise - b.noise), rtol=0, atol=1e-12)
    signal, noise = schedule.signal_and_noise(t, x)
    torch.testing.assert_close(signal * g.x0 + noise * g.noise, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(guided(text, nothing, scale=1)(x, t).x0, a.x0, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_picture(toy):
    schedule = NoiseSchedule.cosine(100)
    denoise = GaussianDiffusion(schedule, "v").denoiser(lambda x, t, c, m: toy(x.double(), t).float())
    def last(seed):
        *_, step = ddpm(denoise, schedule, (1, 3, 8, 8), steps=10, generator=torch.Generator().manual_seed(seed))
        return step.x
    assert torch.equal(last(3), last(3)) and not torch.equal(last(3), last(4))


def test_spacings():
    assert spaced_timesteps(1000, 4, "uniform") == [750, 500, 250, 0]
    assert spaced_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert spaced_timesteps(10, 10, "uniform") == spaced_timesteps(10, 10, "trailing") == list(range(9, -1, -1))


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(steps=101), dict(steps=5, spacing="leading"), dict(steps=5, eta=1.5)])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
        list(ddim(lambda x, t: Prediction(x, x), NoiseSchedule.linear(100), (1, 1, 2, 2), **wrong))
