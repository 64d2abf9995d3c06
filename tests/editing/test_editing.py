"""Editing: exact where no edit is asked for, and of the right order on Gaussians."""

import pytest
import torch

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.editing import (
    align_characters,
    attend_and_excite,
    ddim_inversion,
    prompt_to_prompt,
    regional,
    sdedit,
)
from easy_diffusion.editing.attend_and_excite import attention_gradient, measure_attention
from easy_diffusion.editing.prompt_to_prompt import find_tokens
from easy_diffusion.networks.attention_maps import attention_maps
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet

SCHEDULE = NoiseSchedule.cosine(1000)
SOURCE, TARGET = "番茄炒鸡蛋", "番茄炒豆腐"


def gaussian_denoiser(mean: float, std: float):
    """The optimal denoiser for data from N(mean, std²), in float64."""
    def denoise(x_t, t):
        alpha, sigma = SCHEDULE.alpha_at(int(t[0])), SCHEDULE.sigma_at(int(t[0]))
        variance = alpha ** 2 * std ** 2 + sigma ** 2
        eps = sigma * (x_t - alpha * mean) / variance
        x0 = mean + alpha * std ** 2 * (x_t - alpha * mean) / variance
        return Prediction(x0, eps)

    return denoise


@pytest.fixture
def model():
    """(network, diffusion, encoder) with random weights, whose attention matters.

    None is trained, so that an encoding is the same with and without gradients.
    """
    torch.manual_seed(0)
    encoder = CharacterEncoder("番茄炒鸡蛋豆腐汤", dim=16, heads=2, layers=1).eval()
    network = UNet(channels=(32, 64), context_dim=16, attention=(False, True))
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    encoder.requires_grad_(False)
    return network.eval(), GaussianDiffusion(SCHEDULE, "x0"), encoder


@pytest.fixture
def noise():
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def sample(denoise, x_T, steps=4):
    with torch.no_grad():
        *_, last = ddim(denoise, SCHEDULE, steps=steps, x_T=x_T)
    return last.x


# ------------------------------------------------------------------------- SDEdit


def test_the_edited_images_of_a_gaussian_move_towards_its_mean_with_the_strength():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((1, 1, 64, 64), 3.0, dtype=torch.float64)
    means = []
    for strength in (0.1, 0.5, 0.9, 1.0):
        *_, last = sdedit(gaussian_denoiser(0, 1), SCHEDULE, x0, strength, generator=generator)
        means.append(float(last.x.mean()))
    # For N(0, 1) DDIM keeps x_t as it is, whose mean is 3 alpha_t.
    expected = [3 * SCHEDULE.alpha_at(round(strength * 1000) - 1) for strength in
                (0.1, 0.5, 0.9, 1.0)]
    assert means == pytest.approx(expected, abs=0.08)


def test_full_strength_is_sampling(model, noise):
    network, diffusion, encoder = model
    denoise = diffusion.denoiser(network, *encoder([SOURCE]))
    generator = torch.Generator().manual_seed(1)
    *_, last = sdedit(denoise, SCHEDULE, torch.zeros_like(noise), 1.0, 4, generator=generator)
    expected = sample(denoise, SCHEDULE.sigma_at(999) * noise)
    torch.testing.assert_close(last.x, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0, 1.1, 0.001])
def test_a_strength_that_leaves_no_step_is_refused(strength):
    with pytest.raises(ValueError, match=f"of 50, not {strength}"):
        sdedit(gaussian_denoiser(0, 1), SCHEDULE, torch.zeros(1, 3, 8, 8), strength)


# ------------------------------------------------------------------------- inversion


def reconstruction_error(steps, iterations):
    """Largest error of DDIM from the inverted noise; the noisiest timesteps are left out."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 + 0.7 * torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    spacing = torch.linspace(899, 0, steps).round().long().tolist()
    denoise = gaussian_denoiser(0.5, 0.7)
    *_, last = ddim_inversion(denoise, SCHEDULE, x0, iterations=iterations, spacing=spacing)
    *_, again = ddim(denoise, SCHEDULE, spacing=spacing, x_T=last.x)
    return float((again.x - x0).abs().max())


def test_the_error_of_the_inversion_is_of_first_order_in_the_steps():
    errors = [reconstruction_error(steps, iterations=1) for steps in (25, 50, 100)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.35)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.35)


def test_with_iterations_the_inversion_is_exact():
    assert reconstruction_error(25, iterations=40) < 1e-6
    assert reconstruction_error(25, iterations=3) < 0.3 * reconstruction_error(25, iterations=1)


def test_the_inversion_needs_an_iteration():
    with pytest.raises(ValueError, match="not 0"):
        next(ddim_inversion(gaussian_denoiser(0, 1), SCHEDULE, torch.zeros(1, 3, 8, 8),
                            iterations=0))


# ------------------------------------------------------------------------- regions


def test_each_region_has_its_own_denoiser():
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, ..., :4] = masks[1, ..., 4:] = 1
    denoise = regional([gaussian_denoiser(-1, 0.01), gaussian_denoiser(1, 0.01)], masks)
    x = sample(denoise, torch.randn(1, 3, 8, 8, dtype=torch.float64), steps=20)
    assert (x[..., :4] + 1).abs().max() < 0.1 and (x[..., 4:] - 1).abs().max() < 0.1


def test_one_region_and_equal_denoisers_change_the_prediction_by_no_bit(noise):
    denoise = gaussian_denoiser(0.3, 0.5)
    t = torch.tensor([400])
    expected = denoise(noise, t)
    one = regional([denoise], torch.ones(1, 1, 16, 16))(noise, t)
    assert torch.equal(one.x0, expected.x0) and torch.equal(one.eps, expected.eps)
    two = regional([denoise] * 2, torch.ones(2, 1, 16, 16))(noise, t)
    torch.testing.assert_close(two.eps, expected.eps)


def test_the_variances_of_regions_are_averaged_and_masks_must_fit():
    def with_variance(value):
        return lambda x_t, t: Prediction(x_t, x_t, torch.full_like(x_t, value))

    masks = torch.zeros(2, 1, 8, 8)
    masks[0, ..., :4] = masks[1, ..., 4:] = 1
    denoise = regional([with_variance(-1.0), with_variance(-3.0)], masks)
    log_variance = denoise(torch.zeros(1, 3, 8, 8), None).log_variance
    assert (log_variance[..., :4] == -1).all() and (log_variance[..., 4:] == -3).all()
    with pytest.raises(ValueError, match=r"\(8, 8\) do not fit x_t of \(16, 16\)"):
        denoise(torch.zeros(1, 3, 16, 16), None)


@pytest.mark.parametrize(
    "masks, message",
    [
        (torch.ones(3, 1, 4, 4), "3 masks do not fit 2"),
        (torch.zeros(2, 1, 4, 4), "smallest sum 0"),
        (-torch.ones(2, 1, 4, 4), "smallest value is -1"),
    ],
)
def test_masks_that_cover_less_than_the_image_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        regional([gaussian_denoiser(0, 1)] * 2, masks)


# ------------------------------------------------------------------------- Prompt-to-Prompt


@pytest.mark.parametrize(
    "source, target, replace, expected",
    [
        ("番茄汤", "番茄汤", True, [0, 1, 2, 3]),
        ("番茄炒鸡蛋", "番茄炒豆腐", True, [0, 1, 2, 3, 4, 5]),
        ("番茄炒鸡蛋", "番茄炒豆腐", False, [0, 1, 2, 3, -1, -1]),
        ("番茄汤", "番茄豆腐汤", True, [0, 1, 2, -1, -1, 3]),
        ("番茄豆腐汤", "番茄汤", True, [0, 1, 2, 5]),
        ("番茄炒鸡蛋", "番茄炒牛", True, [0, 1, 2, 3, 4]),
        ("番茄炒鸡蛋", "西兰花炒鸡蛋", True, [0, 1, 1, 2, 3, 4, 5]),
        ("土豆炒鸡蛋", "豆腐炒鸡蛋", True, [0, 1, 2, 3, 4, 5]),
        ("土豆炒鸡蛋", "豆腐炒鸡蛋", False, [0, 2, -1, 3, 4, 5]),
        ("木耳豌豆汤", "木耳豆腐汤", True, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_characters_are_aligned(source, target, replace, expected):
    assert align_characters(source, target, replace) == expected


def test_without_an_edit_both_images_are_plain_samples_to_the_bit(model, noise):
    network, diffusion, encoder = model
    denoise = prompt_to_prompt(*model, SOURCE, TARGET, cross=0, self_attention=0)
    both = sample(denoise, noise.expand(2, -1, -1, -1))
    plain = sample(diffusion.denoiser(network, *encoder([SOURCE, TARGET])),
                   noise.expand(2, -1, -1, -1))
    assert torch.equal(both, plain)


def test_the_same_caption_gives_the_same_image_whatever_is_kept(model, noise):
    denoise = prompt_to_prompt(*model, SOURCE, SOURCE, cross=1, self_attention=1)
    source, target = sample(denoise, noise.expand(2, -1, -1, -1))
    torch.testing.assert_close(source, target, rtol=0, atol=1e-5)


def test_kept_attention_brings_the_target_nearer_to_the_source(model, noise):
    distances = []
    for kept in (0.0, 1.0):
        denoise = prompt_to_prompt(*model, SOURCE, TARGET, cross=kept, self_attention=kept)
        source, target = sample(denoise, noise.expand(2, -1, -1, -1))
        distances.append(float((source - target).square().mean()))
        plain = sample(model[1].denoiser(model[0], *model[2]([SOURCE])), noise)
        torch.testing.assert_close(source[None], plain, rtol=0, atol=1e-5)
    assert 0 < distances[1] < distances[0]


def test_a_factor_changes_the_target_alone_and_1_changes_it_not(model, noise):
    images = {}
    for factor in (1.0, 3.0):
        denoise = prompt_to_prompt(
            *model, SOURCE, SOURCE, cross=0, self_attention=0, factors={"番茄": factor}
        )
        images[factor] = sample(denoise, noise.expand(2, -1, -1, -1))
    torch.testing.assert_close(images[1.0][0], images[1.0][1], rtol=0, atol=1e-5)
    torch.testing.assert_close(images[3.0][0], images[1.0][0], rtol=0, atol=1e-5)
    assert (images[3.0][1] - images[1.0][1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no phrase '牛'"):
        prompt_to_prompt(*model, SOURCE, TARGET, factors={"牛": 2.0})


@torch.no_grad()
def test_more_characters_in_the_place_of_fewer_get_their_attention_together(model, noise):
    network, _, _ = model
    denoise = prompt_to_prompt(*model, "番茄汤", "番茄豆腐鸡汤", cross=1, self_attention=0)
    assert denoise(noise.expand(2, -1, -1, -1), torch.tensor([900, 900])).x0.isfinite().all()
    source, target = "番汤", "番茄豆腐汤"
    assert align_characters(source, target, True) == [0, 1, -1, -1, -1, 2]
    denoise = prompt_to_prompt(*model, "豆汤", "鸡蛋汤", cross=1, self_attention=0)
    with attention_maps(network) as maps:
        denoise(noise.expand(2, -1, -1, -1), torch.tensor([900, 900]))
    for (weights,) in maps.values():                            # start token, 豆 | 鸡 蛋, 汤
        torch.testing.assert_close(weights[1, ..., 1:3].sum(-1), weights[0, ..., 1])
        torch.testing.assert_close(weights[1, ..., 3], weights[0, ..., 2])


def test_it_composes_with_guidance_whose_unconditional_half_is_not_edited(model, noise):
    network, diffusion, encoder = model
    uncond = diffusion.denoiser(network, *encoder([""]))
    denoise = guided(prompt_to_prompt(*model, SOURCE, SOURCE, cross=1), uncond, 2.0)
    both = sample(denoise, noise.expand(2, -1, -1, -1))
    plain = sample(guided(diffusion.denoiser(network, *encoder([SOURCE])), uncond, 2.0), noise)
    # Guidance doubles the rounding errors in each of four steps.
    torch.testing.assert_close(both, plain.expand(2, -1, -1, -1), rtol=0, atol=5e-5)


# ------------------------------------------------------------------------- Attend-and-Excite


def test_tokens_of_phrases_are_found_behind_the_start_token():
    assert find_tokens(SOURCE, ["番茄", "鸡蛋"]) == [[1, 2], [4, 5]]


@pytest.fixture
def excite(model):
    """attend_and_excite of the plain denoiser of SOURCE, with these arguments; and the denoiser."""
    network, diffusion, encoder = model
    plain = diffusion.denoiser(network, *encoder([SOURCE]))

    def make(phrases, **options):
        return attend_and_excite(plain, *model, SOURCE, phrases, **options)

    return make, plain


def test_the_moved_x_t_attends_more_to_the_forgotten_phrase(model, excite, noise):
    network, _, _ = model
    make, plain = excite
    tokens = find_tokens(SOURCE, ["番茄", "鸡蛋"])
    t = torch.tensor([800])
    moved = []
    handle = network.register_forward_pre_hook(lambda module, args: moved.append(args[0].detach()))
    make(["番茄", "鸡蛋"], step_size=2000, iterations=3)(noise, t)
    handle.remove()
    before, after = (
        measure_attention(network, lambda x=x: plain(x, t), tokens).amin(dim=0)
        for x in (noise, moved[-1])
    )
    assert (after > before).all()


def test_a_step_of_ddim_goes_on_from_the_moved_x_t(model, excite, noise):
    """With one iteration it is one step from x_t - step_size · gradient."""
    network, _, _ = model
    make, plain = excite
    t = torch.tensor([999])
    gradient = attention_gradient(network, plain, noise, t, find_tokens(SOURCE, ["番茄"]))
    assert gradient.abs().max() > 0
    excited = next(ddim(make(["番茄"], step_size=500.0), SCHEDULE, steps=4, x_T=noise))
    expected = next(ddim(plain, SCHEDULE, steps=4, x_T=noise - 500 * gradient))
    torch.testing.assert_close(excited.x, expected.x, rtol=0, atol=1e-5)


def test_the_gradient_is_the_same_with_checkpointing(model, noise):
    network, diffusion, encoder = model
    denoise = diffusion.denoiser(network, *encoder([SOURCE]))
    t, tokens = torch.tensor([800]), find_tokens(SOURCE, ["番茄"])
    plain = attention_gradient(network, denoise, noise, t, tokens)
    network.checkpointing = True
    torch.testing.assert_close(attention_gradient(network, denoise, noise, t, tokens), plain)


@torch.no_grad()
def test_after_its_fraction_and_without_a_step_x_t_is_not_moved(excite, noise):
    make, plain = excite
    for options, timestep in (({"fraction": 0.1}, 800), ({"step_size": 0.0}, 950)):
        t = torch.tensor([timestep])
        assert torch.equal(make(["番茄"], **options)(noise, t).x0, plain(noise, t).x0)


def test_wrong_phrases_are_refused(excite):
    make, _ = excite
    with pytest.raises(ValueError, match="no phrase '牛肉'"):
        make(["牛肉"])
    with pytest.raises(ValueError, match="one phrase"):
        make([])
