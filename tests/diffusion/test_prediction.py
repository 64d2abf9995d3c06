"""The contract between a network and the diffusion: its inputs, its output, and what is refused."""

from functools import partial

import pytest
import torch

from easy_diffusion.diffusion.flow_matching import RectifiedFlow
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.prediction import Denoiser, check_output, normal_noise
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.score_sde import VarianceExploding

COSINE = NoiseSchedule.cosine(1000)
X0 = torch.zeros(2, 3, 8, 8)


def tokens(x_t, t, context, mask):
    """[B, H·W, C], the output of a transformer that was not reshaped to an image."""
    return x_t.flatten(2).transpose(1, 2)


def pooled(x_t, t, context, mask):
    """[B, C, 1, 1], which broadcasts to the shape of an image."""
    return x_t.mean(dim=(2, 3), keepdim=True)


def call_gaussian_loss(network):
    GaussianDiffusion(COSINE, "v").loss(network, X0, torch.tensor([3, 500]))


def call_gaussian_denoiser(network):
    GaussianDiffusion(COSINE, "v").denoiser(network)(X0, torch.tensor([3, 500]))


def call_flow_loss(network):
    RectifiedFlow().loss(network, X0, torch.tensor([0.1, 0.5]))


def call_flow_denoiser(network):
    RectifiedFlow().denoiser(network)(X0, torch.tensor([0.1, 0.5]))


def call_sde_loss(network):
    VarianceExploding().loss(network, X0, torch.tensor([0.1, 0.5]))


def call_sde_score(network):
    VarianceExploding().score(network)(X0, torch.tensor([0.1, 0.5]))


@pytest.mark.parametrize("network, shape", [(tokens, "(2, 64, 3)"), (pooled, "(2, 3, 1, 1)")])
@pytest.mark.parametrize("call", [
    call_gaussian_loss,
    call_gaussian_denoiser,
    call_flow_loss,
    call_flow_denoiser,
    call_sde_loss,
    call_sde_score,
])
def test_tokens_and_pooled_outputs_are_refused_with_both_shapes_named(call, network, shape):
    with pytest.raises(ValueError) as error:
        call(network)
    assert f"the shape (2, 3, 8, 8), not {shape}" in str(error.value)


def test_a_network_that_predicts_the_variance_has_twice_the_channels():
    check_output(torch.zeros(2, 6, 8, 8), X0, channels=6)
    with pytest.raises(ValueError, match=r"\(2, 6, 8, 8\), not \(2, 3, 8, 8\): 6 output channels"):
        check_output(torch.zeros(2, 3, 8, 8), X0, channels=6)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\), not \(4, 3, 8, 8\)"):
        check_output(torch.zeros(4, 3, 8, 8), X0, channels=3)


def test_a_wrong_number_of_captions_is_named():
    denoise = Denoiser(None, None, torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="2 captions for 3"):
        denoise(torch.zeros(3, 3, 8, 8), torch.tensor([1]))


def test_an_extra_that_is_bound_by_name_reaches_the_network_in_training_and_in_sampling():
    control = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    context = torch.zeros(1, 1, 4)

    def network(x_t, t, context, mask, control):
        return control

    bound = partial(network, control=control)
    diffusion = GaussianDiffusion(COSINE, "x0")
    loss = diffusion.loss(bound, control, torch.tensor([3, 500]), context)
    assert loss.tolist() == [0, 0]
    denoise = guided(
        diffusion.denoiser(bound, context), diffusion.denoiser(bound, context), scale=3.0
    )
    *_, last = ddim(denoise, COSINE, shape=(2, 3, 8, 8), steps=3)
    torch.testing.assert_close(last.x, control, rtol=0, atol=1e-6)


def test_a_seed_gives_the_same_noise_in_every_precision():
    """But for rounding. PyTorch itself draws other values in bfloat16 before 2.15."""
    def draw(dtype):
        return normal_noise((4, 64), torch.Generator().manual_seed(0), dtype=dtype)

    noise = draw(torch.float32)
    assert torch.equal(draw(torch.bfloat16), noise.bfloat16())
    assert torch.equal(draw(torch.float16), noise.half())
    assert draw(torch.float64).dtype == torch.float64


def test_a_list_of_generators_draws_each_image_from_its_own():
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    noise = normal_noise((2, 3, 8, 8), [generator(0), generator(5)])
    assert torch.equal(noise[0], normal_noise((3, 8, 8), generator(0)))
    assert torch.equal(noise[1], normal_noise((3, 8, 8), generator(5)))
    with pytest.raises(ValueError, match="2 generators do not fit 3 images"):
        normal_noise((3, 3, 8, 8), [generator(0), generator(1)])
