import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_euler_discrete

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import clipped, guided
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.samplers import ddim, ddpm, dpm_solver, heun, karras_timesteps, spaced_timesteps
from easy_diffusion.diffusion.schedule import NoiseSchedule

MEANING = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACING = {"uniform": "leading", "trailing": "trailing"}


def theirs(kind, schedule, **options):
    """diffusers' scheduler, its float32 tables replaced by the float64 ones of the same schedule."""
    scheduler = kind(num_train_timesteps=len(schedule), clip_sample=False, **options)
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.betas, 1 - schedule.betas, schedule.alpha_bar
    scheduler.one, scheduler.final_alpha_cumprod = (torch.tensor(1.0, dtype=torch.float64),) * 2
    return scheduler


class InDouble:
    """torch, but its float32 is float64: for schedulers that round each sample to float32."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def at_levels_of(scheduler, schedule, timesteps, twice=False):
    """diffusers' scheduler at these timesteps, its noise levels in float64 and not rounded to float32."""
    scheduler.set_timesteps(timesteps=timesteps)
    levels = [float(schedule.sigma_t[t] / schedule.alpha_t[t]) for t in timesteps]
    levels = levels[:1] + [level for level in levels[1:] for _ in range(1 + twice)] + [0.0]
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    return scheduler


def start():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps, spacing", [(1000, "uniform"), (50, "uniform"), (25, "trailing")])
def test_ddpm_trajectory_equals_diffusers(toy, schedule, prediction_type, variance, steps, spacing):
    scheduler = theirs(DDPMScheduler, schedule, prediction_type=MEANING[prediction_type], variance_type=variance,
                       timestep_spacing=SPACING[spacing])
    scheduler.set_timesteps(steps)
    x, generator = start(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, prediction_type, variance).denoiser(toy)
    ours = ddpm(denoise, schedule, steps=steps, spacing=spacing, generator=torch.Generator().manual_seed(2), x_T=x)
    for t, step in zip(scheduler.timesteps, ours, strict=True):
        x = scheduler.step(toy(x, t.expand(2)), t, x, generator=generator).prev_sample
        assert step.t == t
        if spacing == "trailing" and variance == "fixed_large" and t == scheduler.timesteps[-1]:
            break       # there diffusers adds the noise of a step to t > 0 to its last picture; ours ends at the mean
        # relative: a first step of cosine divides by a signal of 5e-5, so that values of 1e4 occur
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps, spacing", [(250, "uniform"), (50, "uniform"), (7, "uniform"), (20, "trailing")])
def test_ddim_trajectory_equals_diffusers(toy, schedule, prediction_type, eta, steps, spacing):
    scheduler = theirs(DDIMScheduler, schedule, prediction_type=MEANING[prediction_type], timestep_spacing=SPACING[spacing])
    scheduler.set_timesteps(steps)
    x, generator = start(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, prediction_type).denoiser(toy)
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


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps, spacing", [(50, "uniform"), (10, "trailing")])
def test_ddpm_with_a_learned_variance_equals_diffusers(toy, schedule, steps, spacing):
    scheduler = theirs(DDPMScheduler, schedule, prediction_type="v_prediction", variance_type="learned_range",
                       timestep_spacing=SPACING[spacing])
    scheduler.set_timesteps(steps)
    def network(x, t, context=None, mask=None):
        return torch.cat([toy(x, t), torch.cos(3 * x)], dim=1)
    x, generator = start(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, "v", "learned_range").denoiser(network)
    ours = ddpm(denoise, schedule, steps=steps, spacing=spacing, generator=torch.Generator().manual_seed(2), x_T=x)
    for t, step in zip(scheduler.timesteps[:-1], ours):     # the last one: see above, diffusers' trailing adds noise to it
        x = scheduler.step(network(x, t.expand(2)), t, x, generator=generator).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize("steps, spacing", [(12, "trailing"), (30, "trailing"), (20, "uniform"), (2, "quadratic"), (1, "trailing")])
def test_dpm_solver_trajectory_equals_diffusers(toy, monkeypatch, schedule, prediction_type, stochastic, steps, spacing):
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", InDouble())
    scheduler = DPMSolverMultistepScheduler(prediction_type=MEANING[prediction_type], timestep_spacing="trailing",
                                            algorithm_type="sde-dpmsolver++" if stochastic else "dpmsolver++")
    timesteps = spaced_timesteps(1000, steps, spacing)
    if spacing == "trailing":                               # the one spacing of which both have the same idea
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps
    at_levels_of(scheduler, schedule, timesteps)
    x, generator = start(), torch.Generator().manual_seed(2)
    denoise = GaussianDiffusion(schedule, prediction_type).denoiser(toy)
    ours = dpm_solver(denoise, schedule, steps=steps, stochastic=stochastic, spacing=spacing, x_T=x,
                      generator=torch.Generator().manual_seed(2))
    for t, step in zip(timesteps, ours, strict=True):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = scheduler.step(toy(x, torch.full((2,), t)), t, x, variance_noise=noise).prev_sample
        assert step.t == t
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(1000), NoiseSchedule.scaled_linear(1000)], ids=["linear", "scaled"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler, kind", [(ddim, EulerDiscreteScheduler), (heun, HeunDiscreteScheduler)])
@pytest.mark.parametrize("steps", [5, 18, 50])
def test_ddim_and_heun_equal_diffusers_euler_and_heun(toy, monkeypatch, schedule, prediction_type, sampler, kind, steps):
    """There x is x / signal, so that x_T is divided and the network's input multiplied by it."""
    monkeypatch.setattr(scheduling_euler_discrete, "torch", InDouble())
    timesteps = karras_timesteps(schedule, steps, sigma_max=math.inf)
    scheduler = kind(prediction_type=MEANING[prediction_type])
    scheduler.alphas_cumprod = schedule.alpha_bar
    at_levels_of(scheduler, schedule, timesteps, twice=kind is HeunDiscreteScheduler)
    denoise = GaussianDiffusion(schedule, prediction_type).denoiser(toy)
    *_, last = sampler(denoise, schedule, spacing=timesteps, x_T=start())
    x = start() / schedule.alpha_t[timesteps[0]]
    for t in scheduler.timesteps:
        output = toy(scheduler.scale_model_input(x, t), t.long().expand(2))
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(last.x, x, rtol=1e-6, atol=1e-6)


def test_karras_levels_equal_diffusers_rounded_to_timesteps():
    schedule = NoiseSchedule.linear(1000)
    scheduler = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    theirs = scheduler.timesteps[[0, *range(1, 19, 2)]]     # each but the first stands there twice
    # Their noise levels are float32; near the least noise that moves a level by less than a thousandth of a timestep.
    assert karras_timesteps(schedule, 10, sigma_max=math.inf) == [round(float(t)) for t in theirs]
    assert karras_timesteps(schedule, 1000, sigma_max=math.inf) == list(range(999, -1, -1))
    cosine = NoiseSchedule.cosine(1000)
    first = karras_timesteps(cosine, 12)[0]                 # the timestep nearest to a noise of 80 times the signal
    assert abs(math.log(float(cosine.sigma_t[first] / cosine.alpha_t[first]) / 80)) < 0.06
    assert karras_timesteps(cosine.zero_terminal_snr(), 1) == karras_timesteps(cosine.zero_terminal_snr(), 12)[:1]


@pytest.mark.parametrize("steps", [1000, 40])
def test_ddim_with_eta_1_is_ddpm(toy, steps):
    schedule, x = NoiseSchedule.linear(1000), start()
    denoise = GaussianDiffusion(schedule, "v", "fixed_small").denoiser(toy)
    runs = [list(sampler(denoise, schedule, steps=steps, x_T=x, generator=torch.Generator().manual_seed(5), **more))
            for sampler, more in ((ddpm, {}), (ddim, {"eta": 1.0}))]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-9)


SAMPLERS = [(ddpm, dict(steps=500)), (ddim, dict(steps=200)), (ddim, dict(steps=300, eta=0.5, spacing="quadratic")),
            (dpm_solver, dict(steps=40)), (dpm_solver, dict(steps=200, stochastic=True)), (heun, dict(steps=80))]


@pytest.mark.parametrize("sampler, options", SAMPLERS, ids=lambda v: v.__name__ if callable(v) else "-".join(map(str, v.values())))
@pytest.mark.parametrize("world", ["single_gaussian", "mixture"])
def test_every_sampler_reaches_the_mean_and_covariance(request, world, sampler, options):
    schedule, world = NoiseSchedule.cosine(1000), request.getfixturevalue(world)
    *_, last = sampler(world.denoiser(schedule), schedule, (20_000, 2, 1, 1), dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0), **options)
    # 20,000 samples: standard errors of at most 0.004 in the mean and 0.003 in the covariance
    world.assert_reached_by(last.x, mean=0.012, covariance=0.01)


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2), (heun, 2)])
def test_order_of_convergence_against_the_exact_solution_of_the_ode(single_gaussian, sampler, order):
    """For N(m, Σ) each direction of x̄ - m, x̄ = x / signal, shrinks as sqrt(variance + σ̄²). Error ∝ steps^-order."""
    schedule = NoiseSchedule.cosine(10_000)
    values, vectors = torch.linalg.eigh(single_gaussian.covariance)
    first, last = 8000, 1000
    sigma = schedule.sigma_t / schedule.alpha_t
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shrink = torch.sqrt((values + sigma[last] ** 2) / (values + sigma[first] ** 2))
    exact = schedule.alpha_t[last] * (single_gaussian.mean + (x / schedule.alpha_t[first] - single_gaussian.mean) @ vectors * shrink @ vectors.T)
    errors, counts = [], (25, 50, 100, 200)
    for count in counts:
        timesteps = [round(t) for t in np.linspace(first, last, count + 1)]
        *_, at_last, _ = sampler(single_gaussian.denoiser(schedule), schedule, spacing=timesteps, x_T=x.view(50, 2, 1, 1))
        errors.append(float((at_last.x.view(50, 2) - exact).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15), errors


def test_guidance_mixes_the_noise_by_its_formula_and_x0_with_it():
    schedule, x, t = NoiseSchedule.cosine(1000), start(), torch.tensor([400, 400])
    diffusion = GaussianDiffusion(schedule, "v")
    text = diffusion.denoiser(lambda x, t, c, m: torch.sin(x))
    nothing = diffusion.denoiser(lambda x, t, c, m: torch.cos(x))
    a, b, g = text(x, t), nothing(x, t), guided(text, nothing, scale=3.5)(x, t)
    torch.testing.assert_close(g.eps, b.eps + 3.5 * (a.eps - b.eps), rtol=0, atol=1e-12)
    signal, noise = schedule.alpha_sigma(t, x)
    torch.testing.assert_close(signal * g.x0 + noise * g.eps, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(guided(text, nothing, scale=1)(x, t).x0, a.x0, rtol=0, atol=0)


def test_outside_its_interval_guidance_asks_the_text_alone():
    asked = []
    def denoise(who):
        return lambda x, t: asked.append(who) or Prediction(x * len(who), x)
    x = start()
    denoise = guided(denoise("text"), denoise("nothing"), scale=3.0, interval=(200, 600))
    results = [denoise(x, torch.tensor([t, t])).x0 for t in (199, 200, 600, 601)]
    assert asked == ["text", "text", "nothing", "text", "nothing", "text"]
    assert torch.equal(results[0], 4 * x) and torch.equal(results[3], 4 * x) and torch.equal(results[1], results[2])
    torch.testing.assert_close(results[1], 7 * x + 3 * (4 - 7) * x)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_equals_diffusers_and_keeps_x_t(rescale):
    schedule, x, t = NoiseSchedule.cosine(1000), start(), torch.tensor([400, 400])
    diffusion = GaussianDiffusion(schedule, "x0")
    text, nothing = (diffusion.denoiser(network) for network in (lambda x, t, c, m: torch.sin(x), lambda x, t, c, m: torch.cos(2 * x)))
    plain = guided(text, nothing, scale=5.0)(x, t)
    ours = guided(text, nothing, scale=5.0, rescale=rescale, schedule=schedule)(x, t)
    torch.testing.assert_close(ours.x0, rescale_noise_cfg(plain.x0, text(x, t).x0, guidance_rescale=rescale), rtol=0, atol=1e-12)
    signal, noise = schedule.alpha_sigma(t, x)
    torch.testing.assert_close(signal * ours.x0 + noise * ours.eps, x, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="rescale=0.7 needs the schedule"):
        guided(text, nothing, scale=5.0, rescale=0.7)


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver, heun])
def test_a_schedule_that_ends_in_pure_noise_can_be_sampled(mixture, sampler):
    schedule = NoiseSchedule.scaled_linear(1000).zero_terminal_snr()
    def denoise(x_t, t):
        if t[0] == 999:
            return Prediction(mixture.mean.view(1, 2, 1, 1).expand_as(x_t), x_t)
        return mixture.denoiser(schedule)(x_t, t)
    *_, last = sampler(denoise, schedule, (20_000, 2, 1, 1), steps=100, spacing=spaced_timesteps(1000, 100), dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))
    # coarser than above: 100 steps only, of which the first is a long one for the methods of second order
    mixture.assert_reached_by(last.x, mean=0.02, covariance=0.02)


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
    assert spaced_timesteps(1000, 5, "quadratic") == [999, 562, 250, 62, 0]
    assert spaced_timesteps(1000, 3, [900, 20, 0]) == [900, 20, 0]
    assert spaced_timesteps(1000, 1, "quadratic") == [999]
    assert spaced_timesteps(20, 20, "quadratic") == list(range(19, -1, -1))
    assert spaced_timesteps(10, 10, "uniform") == spaced_timesteps(10, 10, "trailing") == list(range(9, -1, -1))


def test_half_precision_stays_inside_the_denoiser(toy):
    """x_T of bfloat16 is walked with in float32: the steps' small differences would drown in its eight bits."""
    schedule, x_T = NoiseSchedule.cosine(1000), start().bfloat16()
    def denoise(x_t, t):
        return Prediction(torch.tanh(x_t), x_t)
    for sampler in (ddpm, ddim, dpm_solver, heun):
        half, double = ([*sampler(denoise, schedule, steps=20, x_T=x, generator=torch.Generator().manual_seed(0))][-1].x
                        for x in (x_T, x_T.float()))
        assert half.dtype == torch.float32 and torch.equal(half, double)
    with pytest.raises(ValueError, match="either shape"):
        next(ddim(denoise, schedule))


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(steps=101), dict(steps=5, spacing="leading"), dict(spacing=[5, 5]),
                                   dict(spacing=[100]), dict(steps=5, eta=1.5)])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=f"(not|are) '?{re.escape(str(list(wrong.values())[-1]))}'?$"):
        list(ddim(lambda x, t: Prediction(x, x), NoiseSchedule.linear(100), (1, 1, 2, 2), **wrong))
