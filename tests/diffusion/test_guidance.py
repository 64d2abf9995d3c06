import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import clipped, concat_contexts, guided
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.samplers import ddim

from .test_samplers import COSINE, make_scheduler, make_x_T


def make_denoiser(prediction_type, function):
    """The denoiser of a network that applies a function to x_t."""
    def network(x_t, t, context, mask):
        return function(x_t)

    return GaussianDiffusion(COSINE, prediction_type).denoiser(network)


def test_guidance_equals_its_formula_for_eps_and_x0_agrees():
    x, t = make_x_T(), torch.tensor([400, 400])
    denoise_cond = make_denoiser("v", torch.sin)
    denoise_uncond = make_denoiser("v", torch.cos)
    cond, uncond = denoise_cond(x, t), denoise_uncond(x, t)
    prediction = guided(denoise_cond, denoise_uncond, scale=3.5)(x, t)
    expected_eps = uncond.eps + 3.5 * (cond.eps - uncond.eps)
    torch.testing.assert_close(prediction.eps, expected_eps, rtol=0, atol=1e-12)
    alpha_t, sigma_t = COSINE.alpha_sigma(t, x)
    x_t = alpha_t * prediction.x0 + sigma_t * prediction.eps
    torch.testing.assert_close(x_t, x, rtol=0, atol=1e-12)
    unguided = guided(denoise_cond, denoise_uncond, scale=1)(x, t)
    torch.testing.assert_close(unguided.x0, cond.x0, rtol=0, atol=0)


def test_the_variance_is_that_of_the_conditional_prediction():
    """Clipping keeps it, and rescaling, too."""
    def denoise_with(log_variance):
        def denoise(x, t):
            return Prediction(x, x.sin(), torch.full_like(x, log_variance))

        return denoise

    x, t = make_x_T(), torch.tensor([400, 400])
    for rescale in (0.0, 0.5):
        denoise = guided(
            denoise_with(-3.0), denoise_with(-8.0), 2.0, rescale=rescale, schedule=COSINE
        )
        prediction = clipped(denoise, COSINE)(x, t)
        assert (prediction.log_variance == -3).all()


def test_outside_its_interval_guidance_evaluates_the_conditional_denoiser_only():
    calls = []

    def denoise_cond(x, t):
        calls.append("cond")
        return Prediction(4 * x, x)

    def denoise_uncond(x, t):
        calls.append("uncond")
        return Prediction(7 * x, x)

    x = make_x_T()
    denoise = guided(denoise_cond, denoise_uncond, scale=3.0, interval=(200, 600))
    below, lowest, highest, above = (
        denoise(x, torch.tensor([t, t])).x0 for t in (199, 200, 600, 601)
    )
    assert calls == ["cond", "cond", "uncond", "cond", "uncond", "cond"]
    assert torch.equal(below, 4 * x)
    assert torch.equal(above, 4 * x)
    assert torch.equal(lowest, highest)
    torch.testing.assert_close(lowest, 7 * x + 3 * (4 - 7) * x)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_equals_diffusers_and_eps_agrees(rescale):
    x, t = make_x_T(), torch.tensor([400, 400])
    denoise_cond = make_denoiser("x0", torch.sin)
    denoise_uncond = make_denoiser("x0", lambda x: torch.cos(2 * x))
    plain = guided(denoise_cond, denoise_uncond, scale=5.0)(x, t)
    denoise = guided(denoise_cond, denoise_uncond, scale=5.0, rescale=rescale, schedule=COSINE)
    rescaled = denoise(x, t)
    expected = rescale_noise_cfg(plain.x0, denoise_cond(x, t).x0, guidance_rescale=rescale)
    torch.testing.assert_close(rescaled.x0, expected, rtol=0, atol=1e-12)
    alpha_t, sigma_t = COSINE.alpha_sigma(t, x)
    x_t = alpha_t * rescaled.x0 + sigma_t * rescaled.eps
    torch.testing.assert_close(x_t, x, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="rescale=0.7 needs the schedule"):
        guided(denoise_cond, denoise_uncond, scale=5.0, rescale=0.7)


def test_clipping_equals_diffusers(toy):
    scheduler = make_scheduler(
        DDIMScheduler, COSINE, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    scheduler.register_to_config(clip_sample=True, clip_sample_range=1.0)
    scheduler.set_timesteps(20)
    x = make_x_T()
    denoise = clipped(GaussianDiffusion(COSINE, "v").denoiser(toy), COSINE)
    for t, step in zip(scheduler.timesteps, ddim(denoise, COSINE, steps=20, x_T=x), strict=True):
        output = toy(x, t.expand(2))
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)
        assert step.x0.abs().max() <= 1


def test_clipping_after_guidance_limits_x0_and_clipping_before_it_does_not():
    x, t = make_x_T(), torch.tensor([400, 400])
    denoise_cond = make_denoiser("x0", lambda x: 2 * torch.sin(x))
    denoise_uncond = make_denoiser("x0", torch.cos)
    after = clipped(guided(denoise_cond, denoise_uncond, scale=3.0), COSINE)
    before = guided(clipped(denoise_cond, COSINE), clipped(denoise_uncond, COSINE), scale=3.0)
    assert after(x, t).x0.abs().max() <= 1
    assert before(x, t).x0.abs().max() > 1


# ---------------------------------------------------------------- two contexts in one batch


def test_concatenated_contexts_are_padded_and_the_padding_is_masked():
    long, short = torch.ones(2, 3, 4), torch.ones(1, 1, 4)
    context, mask = concat_contexts(long, None, short, None, batch=2)
    assert context.shape == (4, 3, 4)
    assert mask.tolist() == [[True] * 3] * 2 + [[True, False, False]] * 2
    same_length = torch.ones(1, 3, 4)
    _, mask = concat_contexts(same_length, None, same_length, None, batch=1)
    assert mask is None


def test_a_wrong_number_of_contexts_is_named():
    with pytest.raises(ValueError, match="2 captions for 4"):
        concat_contexts(torch.zeros(2, 1, 4), None, torch.zeros(1, 1, 4), None, 4)
