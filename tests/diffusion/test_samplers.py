import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_euler_discrete

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.samplers import (
    ddim,
    ddpm,
    dpm_solver,
    heun,
    karras_timesteps,
    sampling_loop,
    spaced_timesteps,
)
from easy_diffusion.diffusion.schedule import NoiseSchedule

# diffusers' names for our prediction types and spacings
DIFFUSERS_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
DIFFUSERS_SPACING = {"uniform": "leading", "trailing": "trailing"}

LINEAR = NoiseSchedule.linear(1000)
COSINE = NoiseSchedule.cosine(1000)
both_schedules = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
all_prediction_types = pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])


def make_scheduler(scheduler_class, schedule, **options):
    """A diffusers scheduler with the float64 values of a schedule in place of its float32 ones."""
    scheduler = scheduler_class(num_train_timesteps=len(schedule), clip_sample=False, **options)
    scheduler.betas = schedule.betas
    scheduler.alphas = 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


class TorchInFloat64:
    """torch with float64 as its float32, for schedulers that convert each sample to float32."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def set_noise_levels(scheduler, schedule, timesteps, twice=False):
    """Give a diffusers scheduler these timesteps and their noise levels in float64.

    twice: each level but the first and the last occurs twice, as HeunDiscreteScheduler needs.
    """
    scheduler.set_timesteps(timesteps=timesteps)
    first, *others = (float(schedule.sigma_t[t] / schedule.alpha_t[t]) for t in timesteps)
    others = [level for level in others for _ in range(2 if twice else 1)]
    scheduler.sigmas = torch.tensor([first, *others, 0.0], dtype=torch.float64)


def make_x_T():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- trajectories equal diffusers'


@both_schedules
@all_prediction_types
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(
    "steps, spacing", [(1000, "uniform"), (50, "uniform"), (25, "trailing")]
)
def test_ddpm_trajectory_equals_diffusers(
    toy, schedule, prediction_type, variance, steps, spacing
):
    scheduler = make_scheduler(
        DDPMScheduler, schedule, prediction_type=DIFFUSERS_TYPE[prediction_type],
        variance_type=variance, timestep_spacing=DIFFUSERS_SPACING[spacing],
    )
    scheduler.set_timesteps(steps)
    x, generator = make_x_T(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, prediction_type, variance).denoiser(toy)
    ours = ddpm(
        denoise, schedule, steps=steps, spacing=spacing,
        generator=torch.Generator().manual_seed(2), x_T=x,
    )
    for t, step in zip(scheduler.timesteps, ours, strict=True):
        x = scheduler.step(toy(x, t.expand(2)), t, x, generator=generator).prev_sample
        assert step.t == t
        if spacing == "trailing" and variance == "fixed_large" and t == scheduler.timesteps[-1]:
            break           # diffusers adds noise in this last step; our sample is the mean
        # Relative, since the first step of cosine divides by an alpha_t of 5e-5: values reach 1e4.
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@both_schedules
@pytest.mark.parametrize("steps, spacing", [(50, "uniform"), (10, "trailing")])
def test_ddpm_with_a_learned_variance_equals_diffusers(toy, schedule, steps, spacing):
    scheduler = make_scheduler(
        DDPMScheduler, schedule, prediction_type="v_prediction",
        variance_type="learned_range", timestep_spacing=DIFFUSERS_SPACING[spacing],
    )
    scheduler.set_timesteps(steps)

    def network(x, t, context=None, mask=None):
        return torch.cat([toy(x, t), torch.cos(3 * x)], dim=1)

    x, generator = make_x_T(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, "v", "learned_range").denoiser(network)
    ours = ddpm(
        denoise, schedule, steps=steps, spacing=spacing,
        generator=torch.Generator().manual_seed(2), x_T=x,
    )
    # Without the last step, where diffusers adds noise for "trailing"
    for t, step in zip(scheduler.timesteps[:-1], ours):
        x = scheduler.step(network(x, t.expand(2)), t, x, generator=generator).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@both_schedules
@all_prediction_types
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "steps, spacing", [(250, "uniform"), (50, "uniform"), (7, "uniform"), (20, "trailing")]
)
def test_ddim_trajectory_equals_diffusers(toy, schedule, prediction_type, eta, steps, spacing):
    scheduler = make_scheduler(
        DDIMScheduler, schedule, prediction_type=DIFFUSERS_TYPE[prediction_type],
        timestep_spacing=DIFFUSERS_SPACING[spacing],
    )
    scheduler.set_timesteps(steps)
    x, generator = make_x_T(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, prediction_type).denoiser(toy)
    ours = ddim(
        denoise, schedule, steps=steps, eta=eta, spacing=spacing,
        generator=torch.Generator().manual_seed(2), x_T=x,
    )
    for t, step in zip(scheduler.timesteps, ours, strict=True):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if eta else None
        output = toy(x, t.expand(2))
        x = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@both_schedules
@all_prediction_types
@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize(
    "steps, spacing",
    [(12, "trailing"), (30, "trailing"), (20, "uniform"), (2, "quadratic"), (1, "trailing")],
)
def test_dpm_solver_trajectory_equals_diffusers(
    toy, monkeypatch, schedule, prediction_type, stochastic, steps, spacing
):
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", TorchInFloat64())
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=DIFFUSERS_TYPE[prediction_type],
        timestep_spacing="trailing",
        algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++",
    )
    timesteps = spaced_timesteps(1000, steps, spacing)
    if spacing == "trailing":           # the only spacing that is defined alike in both
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps
    set_noise_levels(scheduler, schedule, timesteps)
    x, generator = make_x_T(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, prediction_type).denoiser(toy)
    ours = dpm_solver(
        denoise, schedule, steps=steps, stochastic=stochastic, spacing=spacing,
        generator=torch.Generator().manual_seed(2), x_T=x,
    )
    for t, step in zip(timesteps, ours, strict=True):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        output = toy(x, torch.full((2,), t))
        x = scheduler.step(output, t, x, variance_noise=z).prev_sample
        assert step.t == t
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "schedule", [LINEAR, NoiseSchedule.scaled_linear(1000)], ids=["linear", "scaled_linear"]
)
@all_prediction_types
@pytest.mark.parametrize(
    "sampler, scheduler_class",
    [(ddim, EulerDiscreteScheduler), (heun, HeunDiscreteScheduler)],
)
@pytest.mark.parametrize("steps", [5, 18, 50])
def test_ddim_and_heun_equal_diffusers_euler_and_heun(
    toy, monkeypatch, schedule, prediction_type, sampler, scheduler_class, steps
):
    """Their samples are x / alpha_t, so x_T is divided by alpha_t here."""
    monkeypatch.setattr(scheduling_euler_discrete, "torch", TorchInFloat64())
    timesteps = karras_timesteps(schedule, steps, sigma_bar_max=math.inf)
    scheduler = scheduler_class(prediction_type=DIFFUSERS_TYPE[prediction_type])
    scheduler.alphas_cumprod = schedule.alpha_bar
    set_noise_levels(scheduler, schedule, timesteps, twice=sampler is heun)
    denoise = GaussianDiffusion(schedule, prediction_type).denoiser(toy)
    *_, last = sampler(denoise, schedule, spacing=timesteps, x_T=make_x_T())
    x = make_x_T() / schedule.alpha_t[timesteps[0]]
    for t in scheduler.timesteps:
        output = toy(scheduler.scale_model_input(x, t), t.long().expand(2))
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(last.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1000, 40])
def test_ddim_with_eta_1_is_ddpm(toy, steps):
    x_T = make_x_T()
    denoise = GaussianDiffusion(LINEAR, "v", "fixed_small").denoiser(toy)
    runs = [
        sampler(
            denoise, LINEAR, steps=steps, x_T=x_T,
            generator=torch.Generator().manual_seed(5), **options,
        )
        for sampler, options in ((ddpm, {}), (ddim, {"eta": 1.0}))
    ]
    for step_ddpm, step_ddim in zip(*runs, strict=True):
        torch.testing.assert_close(step_ddpm.x, step_ddim.x, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- distributions and convergence


SAMPLERS = [
    (ddpm, dict(steps=500)),
    (ddim, dict(steps=200)),
    (ddim, dict(steps=300, eta=0.5, spacing="quadratic")),
    (dpm_solver, dict(steps=40)),
    (dpm_solver, dict(steps=200, stochastic=True)),
    (heun, dict(steps=80)),
]


def parameter_id(value):
    return value.__name__ if callable(value) else "-".join(map(str, value.values()))


@pytest.mark.parametrize("sampler, options", SAMPLERS, ids=parameter_id)
@pytest.mark.parametrize("data", ["single_gaussian", "mixture"])
def test_samples_have_the_mean_and_covariance_of_the_data(request, data, sampler, options):
    data = request.getfixturevalue(data)
    *_, last = sampler(
        data.denoiser(COSINE), COSINE, (20_000, 2, 1, 1),
        dtype=torch.float64, generator=torch.Generator().manual_seed(0), **options,
    )
    # 20,000 samples: standard errors of at most 0.004 in the mean and 0.003 in the covariance
    data.assert_moments(last.x, mean=0.012, covariance=0.01)


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver, heun])
def test_a_schedule_with_zero_terminal_snr_can_be_sampled(mixture, sampler):
    schedule = NoiseSchedule.scaled_linear(1000).zero_terminal_snr()

    def denoise(x_t, t):
        if t[0] == 999:                                     # pure noise: E[x0 | x_t] = E[x0]
            return Prediction(mixture.mean.view(1, 2, 1, 1).expand_as(x_t), x_t)
        return mixture.denoiser(schedule)(x_t, t)

    *_, last = sampler(
        denoise, schedule, (20_000, 2, 1, 1), steps=100, spacing=spaced_timesteps(1000, 100),
        dtype=torch.float64, generator=torch.Generator().manual_seed(0),
    )
    # Larger tolerances than above: 100 steps, and the first one is long for second-order methods.
    mixture.assert_moments(last.x, mean=0.02, covariance=0.02)


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2), (heun, 2)])
def test_order_of_convergence_to_the_exact_solution_of_the_ode(single_gaussian, sampler, order):
    """For data N(mean, Σ) and x̄ = x / alpha_t, σ̄ = sigma_t / alpha_t, the solution is known:

    in the eigenvectors of Σ, (x̄ - mean) / sqrt(variance + σ̄²) is constant.
    """
    schedule = NoiseSchedule.cosine(10_000)
    first, last = 8000, 1000
    sigma_bar = schedule.sigma_t / schedule.alpha_t
    mean = single_gaussian.mean
    values, vectors = torch.linalg.eigh(single_gaussian.covariance)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    ratio = torch.sqrt((values + sigma_bar[last] ** 2) / (values + sigma_bar[first] ** 2))
    centered = (x / schedule.alpha_t[first] - mean) @ vectors
    exact = schedule.alpha_t[last] * (mean + centered * ratio @ vectors.T)

    errors, step_counts = [], (25, 50, 100, 200)
    for steps in step_counts:
        timesteps = [round(t) for t in np.linspace(first, last, steps + 1)]
        denoise = single_gaussian.denoiser(schedule)
        # The last step goes on to the clean image; the one before reaches the timestep `last`.
        *_, step, _ = sampler(denoise, schedule, spacing=timesteps, x_T=x.view(50, 2, 1, 1))
        errors.append(float((step.x.view(50, 2) - exact).abs().max()))
    slope = -np.polyfit(np.log(step_counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15), errors


# ---------------------------------------------------------------- timesteps


def test_spacings():
    assert spaced_timesteps(1000, 4, "uniform") == [750, 500, 250, 0]
    assert spaced_timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert spaced_timesteps(1000, 5, "quadratic") == [999, 562, 250, 62, 0]
    assert spaced_timesteps(1000, 3, [900, 20, 0]) == [900, 20, 0]
    assert spaced_timesteps(1000, 1, "quadratic") == [999]
    every_timestep_of_20 = list(range(19, -1, -1))
    assert spaced_timesteps(20, 20, "quadratic") == every_timestep_of_20
    every_timestep_of_10 = list(range(9, -1, -1))
    assert spaced_timesteps(10, 10, "uniform") == every_timestep_of_10
    assert spaced_timesteps(10, 10, "trailing") == every_timestep_of_10


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_timesteps_are_those_nearest_to_the_levels_of_any_rho(rho):
    sigma_bar = (LINEAR.sigma_t / LINEAR.alpha_t).numpy()
    low, high = sigma_bar[0] ** (1 / rho), 20 ** (1 / rho)
    levels = (high + np.linspace(0, 1, 8) * (low - high)) ** rho
    distances = np.abs(np.log(sigma_bar[:, None] / levels))             # [T, levels]
    expected = distances.argmin(axis=0).tolist()
    assert karras_timesteps(LINEAR, 8, rho=rho, sigma_bar_max=20) == expected


def test_karras_timesteps_equal_diffusers_rounded_to_integers():
    scheduler = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    # Each of theirs but the first occurs twice. Their noise levels are float32, which changes a
    # timestep by less than 0.001.
    theirs = scheduler.timesteps[[0, *range(1, 19, 2)]]
    expected = [round(float(t)) for t in theirs]
    assert karras_timesteps(LINEAR, 10, sigma_bar_max=math.inf) == expected
    assert karras_timesteps(LINEAR, 1000, sigma_bar_max=math.inf) == list(range(999, -1, -1))

    # By default the first one is nearest to sigma_t / alpha_t = 80.
    first = karras_timesteps(COSINE, 12)[0]
    assert abs(math.log(float(COSINE.sigma_t[first] / COSINE.alpha_t[first]) / 80)) < 0.06
    rescaled = COSINE.zero_terminal_snr()
    assert karras_timesteps(rescaled, 1) == karras_timesteps(rescaled, 12)[:1]


# ---------------------------------------------------------------- the interface


def test_a_new_sampler_is_a_step_function_for_the_sampling_loop(toy):
    """The example of samplers.py, deterministic DDIM."""
    def step(schedule, prediction, x_t, t, s, z):
        assert z is None
        return schedule.alpha_at(s) * prediction.x0 + schedule.sigma_at(s) * prediction.eps

    denoise = GaussianDiffusion(COSINE, "v").denoiser(toy)
    timesteps = spaced_timesteps(1000, 7)
    ours = sampling_loop(step, denoise, COSINE, timesteps, x_T=make_x_T(), stochastic=False)
    expected = ddim(denoise, COSINE, steps=7, x_T=make_x_T())
    for step_ours, step_ddim in zip(ours, expected, strict=True):
        assert step_ours.t == step_ddim.t
        torch.testing.assert_close(step_ours.x, step_ddim.x, rtol=0, atol=1e-12)


def euler_ancestral_step(schedule, prediction, x_t, t, s, z):
    """Euler's method for x̄ = x / alpha down to σ̄_down, then noise up to σ̄_s (Karras's σ̄)."""
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    sigma_t = (1 / alpha_bar_t - 1) ** 0.5  # σ̄_t = sigma_t / alpha_t
    sigma_s = (1 / alpha_bar_s - 1) ** 0.5  # σ̄_s
    sigma_down = sigma_s**2 / sigma_t
    sigma_up = (sigma_s**2 - sigma_down**2) ** 0.5
    x_bar = x_t / alpha_bar_t**0.5
    slope = (x_bar - prediction.x0) / sigma_t
    return alpha_bar_s**0.5 * (x_bar + (sigma_down - sigma_t) * slope + sigma_up * z)


@both_schedules
@pytest.mark.parametrize("steps", [1, 13, 50])
def test_euler_ancestral_as_a_step_function_is_ddim_with_eta_1(toy, schedule, steps):
    # The cosine schedule ends with σ̄ in the thousands, where x̄ loses three digits to rounding.
    timesteps = spaced_timesteps(960, steps)
    denoise = GaussianDiffusion(schedule, "v").denoiser(toy)
    ours = sampling_loop(
        euler_ancestral_step, denoise, schedule, timesteps, x_T=make_x_T(),
        generator=torch.Generator().manual_seed(5),
    )
    expected = ddim(
        denoise, schedule, spacing=timesteps, eta=1.0, x_T=make_x_T(),
        generator=torch.Generator().manual_seed(5),
    )
    for step_ours, step_ddim in zip(ours, expected, strict=True):
        torch.testing.assert_close(step_ours.x, step_ddim.x, rtol=0, atol=1e-12)


@both_schedules
def test_ddim_is_euler_s_method_for_x_divided_by_alpha(toy, schedule):
    """x̄_s = x̄_t + (σ̄_s - σ̄_t) eps, with x̄ = x / alpha and σ̄ = sigma / alpha."""
    def step(schedule, prediction, x_t, t, s, z):
        alpha_t, alpha_s = schedule.alpha_at(t), schedule.alpha_at(s)
        sigma_bar_t, sigma_bar_s = schedule.sigma_at(t) / alpha_t, schedule.sigma_at(s) / alpha_s
        return alpha_s * (x_t / alpha_t + (sigma_bar_s - sigma_bar_t) * prediction.eps)

    denoise = GaussianDiffusion(schedule, "v").denoiser(toy)
    timesteps = spaced_timesteps(960, 13)
    ours = sampling_loop(step, denoise, schedule, timesteps, x_T=make_x_T(), stochastic=False)
    expected = ddim(denoise, schedule, spacing=timesteps, x_T=make_x_T())
    for step_ours, step_ddim in zip(ours, expected, strict=True):
        torch.testing.assert_close(step_ours.x, step_ddim.x, rtol=0, atol=1e-12)


def test_the_options_of_the_sampling_loop_are_passed_by_keyword(toy):
    with pytest.raises(TypeError, match="positional"):
        next(sampling_loop(None, toy, COSINE, [5, 0], (2, 3, 8, 8)))


def test_the_same_seed_gives_the_same_image(toy):
    schedule = NoiseSchedule.cosine(100)

    def network(x, t, context, mask):
        return toy(x.double(), t).float()

    denoise = GaussianDiffusion(schedule, "v").denoiser(network)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        *_, last = ddpm(denoise, schedule, (1, 3, 8, 8), steps=10, generator=generator)
        return last.x

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))


def test_an_x_T_in_half_precision_is_sampled_in_float32():
    """In bfloat16, with eight bits of precision, the small changes of a step would be lost."""
    x_T = make_x_T().bfloat16()

    def denoise(x_t, t):
        return Prediction(torch.tanh(x_t), x_t)

    for sampler in (ddpm, ddim, dpm_solver, heun):
        samples = []
        for initial in (x_T, x_T.float()):
            generator = torch.Generator().manual_seed(0)
            *_, last = sampler(denoise, COSINE, steps=20, x_T=initial, generator=generator)
            samples.append(last.x)
        assert samples[0].dtype == torch.float32
        assert torch.equal(*samples)
    with pytest.raises(ValueError, match="either shape"):
        next(ddim(denoise, COSINE))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps=0),
        dict(steps=101),
        dict(steps=5, spacing="leading"),
        dict(spacing=[5, 5]),
        dict(spacing=[100]),
        dict(steps=5, eta=1.5),
    ],
)
def test_invalid_arguments_are_named(wrong):
    def denoise(x, t):
        return Prediction(x, x)

    *_, value = wrong.values()
    with pytest.raises(ValueError, match=f"not '?{re.escape(str(value))}'?$"):
        list(ddim(denoise, NoiseSchedule.linear(100), (1, 1, 2, 2), **wrong))
