"""FastUNet gives the outputs of its UNet, for cached contexts and several captions an image."""

import pytest
import torch

from easy_diffusion.diffusion.guidance import batched_guidance, guided
from easy_diffusion.diffusion.prediction import Denoiser, Prediction
from easy_diffusion.networks.fast_unet import FastUNet, make_fast
from easy_diffusion.networks.unet import UNet

from .test_unet import small_unet, without_zeros

# In each, the layer that first depends on the context is at another place.
LAYOUTS = [
    dict(attention=(False, True)),
    dict(attention=(True, False)),
    dict(pooled=True),
    dict(patch=2),
]


def count_calls(module):
    """A list that grows by one at each call of the module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def small_inputs():
    """x_t [3, 3, 16, 16], t [3]."""
    return torch.randn(3, 3, 16, 16), torch.tensor([3, 500, 700])


# ---------------------------------------------------------------- cached contexts


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("captions", [1, 3])
def test_a_cached_context_gives_the_same_output(options, captions):
    network = small_unet(**options)
    fast = FastUNet(network)
    x, t = small_inputs()
    context = torch.randn(captions, 9, 16)
    mask = torch.arange(9) < torch.randint(2, 7, (captions, 1))
    cached = fast.cache_context(context, mask)
    # Tokens that are padding in all captions are left out.
    assert len(cached[0].context[0]) == mask.any(0).sum() < 9
    with torch.no_grad():
        expected = network(x, t, context.expand(3, -1, -1), mask.expand(3, -1))
        for _ in range(2):
            torch.testing.assert_close(fast(x, t, *cached), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(fast(x, t, context, mask), expected, rtol=0, atol=2e-5)


def test_keys_are_computed_once_and_again_when_the_weights_change():
    network = small_unet()
    fast = FastUNet(network)
    t = torch.tensor([5])
    x = torch.randn(1, 3, 16, 16)
    context = torch.randn(1, 4, 16)
    to_k = network.middle[1].block.cross_attention.to_k
    calls = count_calls(to_k)
    cached = fast.cache_context(context)
    with torch.no_grad():
        fast(x, t, *cached)
        fast(x, t, *cached)
        assert len(calls) == 1
        to_k.weight.mul_(2)
        expected = network(x, t, context)
        torch.testing.assert_close(fast(x, t, *cached), expected, rtol=0, atol=1e-5)

    # With gradients, each call builds a graph of its own.
    fast(x, t, *cached).sum().backward()
    fast(x, t, *cached).sum().backward()
    assert to_k.weight.grad.abs().max() > 0

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(fast(x, t, *cached)).all()


def test_a_compiled_network_caches_a_context_and_notices_changed_weights():
    network = without_zeros(UNet(channels=(32,), context_dim=16))
    compiled = torch.compile(FastUNet(network), backend="eager")
    x = torch.randn(1, 3, 8, 8)
    t = torch.tensor([5])
    context = torch.randn(1, 4, 16)
    cached = compiled.cache_context(context)
    with torch.no_grad():
        for _ in range(2):
            expected = network(x, t, context)
            torch.testing.assert_close(compiled(x, t, *cached), expected, rtol=0, atol=1e-5)
            network.middle[1].block.cross_attention.to_v.weight.mul_(2)


def test_gradients_are_those_of_the_unet():
    network = small_unet(pooled=True)
    x, t = small_inputs()
    context = torch.randn(3, 4, 16)
    gradients = []
    for module in (network, FastUNet(network)):
        loss = module(x, t, context).square().sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_network_without_a_context_dim_is_called_as_it_is():
    network = small_unet(context_dim=None)
    x, t = small_inputs()
    assert torch.equal(FastUNet(network)(x, t), network(x, t))


# ---------------------------------------------------------------- several captions an image


@pytest.mark.parametrize("options", [*LAYOUTS, dict(context_dim=None)], ids=str)
@pytest.mark.parametrize("captions_per_image", [2, 3])
def test_several_captions_an_image_are_computed_together_before_the_context(
    options, captions_per_image
):
    network = small_unet(**options)
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    context = torch.randn(2 * captions_per_image, 4, 16)
    repeated = x.repeat(captions_per_image, 1, 1, 1), t.repeat(captions_per_image)
    expected = network(*repeated, context)
    batch_sizes = []
    network.conv_in.register_forward_hook(lambda _, x, __: batch_sizes.append(len(x[0])))
    out = FastUNet(network)(x, t, context)
    assert batch_sizes == [2]
    assert len(out) == 2 * captions_per_image
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_guidance_calls_a_network_once_with_the_same_prediction_as_two_calls(options, masked):
    network = small_unet(**options)
    fast = FastUNet(network)
    calls = count_calls(fast)
    calls_of_unet = count_calls(network)

    def to_prediction(output, x_t, t):
        return Prediction(output, x_t - output, t.view(-1, 1, 1, 1) * torch.ones(1))

    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    context, uncond_context = torch.randn(2, 6, 16), torch.randn(1, 1, 16)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6]) if masked else None

    def guided_by(module):
        cond = Denoiser(module, to_prediction, context, mask)
        uncond = Denoiser(module, to_prediction, uncond_context)
        return guided(cond, uncond, 3.0)

    with torch.no_grad():
        once = guided_by(fast)(x, t)
        assert len(calls) == 1
        assert len(calls_of_unet) == 0
        twice = guided_by(network)(x, t)
        assert len(calls_of_unet) == 2
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


def test_only_denoisers_of_the_same_network_are_batched():
    first = FastUNet(without_zeros(UNet(channels=(32,), context_dim=16)))
    second = FastUNet(without_zeros(UNet(channels=(32,), context_dim=16)))
    context = torch.randn(1, 2, 16)
    calls_of_first = count_calls(first)
    calls_of_second = count_calls(second)

    def to_prediction(output, x_t, t):
        return Prediction(output, output)

    denoise_both = batched_guidance(
        Denoiser(first, to_prediction, context), Denoiser(second, to_prediction, context)
    )
    denoise_both(torch.randn(1, 3, 8, 8), torch.tensor([1]))
    assert len(calls_of_first) + len(calls_of_second) == 2


# ---------------------------------------------------------------- which networks are wrapped


def test_a_unet_is_made_fast_and_a_network_with_a_forward_of_its_own_stays_as_it_is():
    class Negated(UNet):
        def forward(self, *arguments):
            return -super().forward(*arguments)

    def function(x_t, t, context, mask):
        return x_t

    network = UNet(channels=(32,))
    assert make_fast(network).unet is network
    for other in (Negated(channels=(32,)), FastUNet(network), function):
        assert make_fast(other) is other


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("captions, side, message", [
    (4, 16, "4 captions does not fit 3 images: it needs 1 caption or a multiple of 3"),
    (3, 15, "multiples of 2"),
    (0, 16, "needs a context"),
])
def test_wrong_sizes_are_named(captions, side, message):
    network = FastUNet(UNet(channels=(32, 64), context_dim=4))
    context = torch.zeros(captions, 1, 4) if captions else None
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(3, 3, side, side), torch.tensor([1, 2, 3]), context)
