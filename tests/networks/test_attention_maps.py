"""Attention weights that are read and edited: exact without an edit, restored after it."""

import pytest
import torch

from easy_diffusion.networks.attention_maps import attention_edited, attention_maps, token_maps
from easy_diffusion.networks.blocks import Attention
from easy_diffusion.networks.fast_unet import FastUNet
from easy_diffusion.networks.image_prompt import ImagePromptUNet
from easy_diffusion.networks.motion import VideoUNet
from easy_diffusion.networks.unet import UNet


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = UNet(channels=(32, 64), context_dim=16, attention=(False, True))
    for parameter in network.parameters():
        if parameter.abs().max() == 0:                      # the layers that begin at zero
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2, 5, 16, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([10, 700]), context, mask


def keep(weights, layer, is_cross):
    return weights


@torch.no_grad()
def test_an_edit_that_keeps_the_weights_leaves_the_output_equal_to_the_bit(network, inputs):
    before = network(*inputs)
    with attention_edited(network, keep):
        assert torch.equal(network(*inputs), before)
    with attention_edited(network, lambda weights, *_: weights.clone()):
        torch.testing.assert_close(network(*inputs), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_context_serves_all_images(network, inputs):
    x, t, context, mask = inputs
    before = network(x, t, context[:1])
    with attention_edited(network, lambda weights, *_: weights.clone()):
        torch.testing.assert_close(network(x, t, context[:1]), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_edit_of_one_layer_changes_the_output_and_is_gone_afterwards(network, inputs):
    before = network(*inputs)
    layers = []

    def uniform(weights, layer, is_cross):
        layers.append((layer, is_cross))
        if layer == "middle.1.block.self_attention":
            return torch.full_like(weights, 1 / weights.shape[-1])
        return weights

    with attention_edited(network, uniform):
        assert (network(*inputs) - before).abs().max() > 1e-4
    assert torch.equal(network(*inputs), before)
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    assert len(layers) == len(attentions)
    assert {is_cross for layer, is_cross in layers if "cross" in layer} == {True}
    assert {is_cross for layer, is_cross in layers if "self" in layer} == {False}


@torch.no_grad()
def test_an_exception_restores_the_network(network, inputs):
    before = network(*inputs)

    def fail(*_):
        raise RuntimeError("in the edit")

    with pytest.raises(RuntimeError, match="in the edit"), attention_edited(network, fail):
        network(*inputs)
    assert torch.equal(network(*inputs), before)
    assert not any("forward" in module.__dict__ for module in network.modules())


@torch.no_grad()
def test_nested_edits_are_applied_from_the_inner_one_to_the_outer_one(network, inputs):
    before = network(*inputs)
    seen = []

    def uniform(weights, *_):
        return torch.full_like(weights, 1 / weights.shape[-1])

    def record(weights, *_):
        seen.append(bool((weights == weights[..., :1]).all()))
        return weights

    with attention_edited(network, uniform):
        edited = network(*inputs)
        with attention_edited(network, record):
            assert torch.equal(network(*inputs), edited)
            assert not any(seen)                                # the inner one sees the network's
        assert torch.equal(network(*inputs), edited)
    seen.clear()
    with attention_edited(network, record), attention_edited(network, uniform):
        assert torch.equal(network(*inputs), edited)
    assert all(seen)                                            # the outer one sees the edited
    assert torch.equal(network(*inputs), before)
    assert not any({"forward", "edits"} & module.__dict__.keys() for module in network.modules())


@torch.no_grad()
def test_half_precision_takes_weights_in_float32(network, inputs):
    x, t, context, mask = inputs
    network = network.bfloat16()
    before = network(x, t, context, mask)
    with attention_edited(network, lambda weights, *_: weights.float()):
        after = network(x, t, context, mask)
    assert (after - before).abs().max() < 0.05 * before.abs().max()


@torch.no_grad()
def test_the_attention_over_time_is_left_as_it_is(network, inputs):
    video = VideoUNet.from_unet(network)
    film = torch.randn(2, 3, 4, 16, 16)
    before = video(film, *inputs[1:])
    with attention_edited(video, lambda weights, *_: weights.clone()):
        torch.testing.assert_close(video(film, *inputs[1:]), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_maps_are_the_weights_and_padding_has_none(network, inputs):
    with attention_maps(network) as maps:
        network(*inputs)
        network(*inputs)
    assert all(len(weights) == 2 for weights in maps.values())
    assert all("cross_attention" in layer for layer in maps)
    weights = maps["middle.1.block.cross_attention"][0]             # [B, heads, 8·8, L]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 64))
    assert weights[1, ..., 3:].abs().max() == 0
    assert token_maps(weights, 8, 8).shape == (2, 5, 8, 8)
    with attention_maps(network, is_cross=False) as maps:
        network(*inputs)
    assert all("self_attention" in layer for layer in maps)


def test_gradients_reach_what_comes_before_an_edited_layer(network, inputs):
    x, t, context, mask = inputs
    x = x.requires_grad_()
    with attention_edited(network, lambda weights, *_: 2 * weights):
        network(x, t, context, mask).sum().backward()
    assert x.grad.abs().max() > 0


def test_what_cannot_be_edited_is_refused(network, inputs):
    with pytest.raises(ValueError, match="FastUNet"), attention_edited(FastUNet(network), keep):
        pass
    prompted = ImagePromptUNet.from_unet(network, image_tokens=3)
    with pytest.raises(ValueError, match="ImagePromptUNet"), attention_edited(prompted, keep):
        pass
    with pytest.raises(ValueError, match="Linear"), attention_edited(torch.nn.Linear(1, 1), keep):
        pass
    with pytest.raises(ValueError, match=r"the edit of .* made"):
        with attention_edited(network, lambda weights, *_: weights[..., :1]):
            network(*inputs)
