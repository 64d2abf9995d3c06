"""Image prompts: an untrained adapter adds zero, a trained one adds what the formula says."""

import copy

import pytest
import torch

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.blocks import Attention
from easy_diffusion.networks.image_prompt import (
    DecoupledAttention,
    ImageEncoder,
    ImagePromptUNet,
)
from easy_diffusion.networks.joint_encoder import JointEncoder
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.trainer import train


def make_unet(**changes):
    torch.manual_seed(0)
    settings = dict(channels=(64, 64), attention=(False, True), context_dim=16, pooled=True)
    unet = UNet(**settings | changes)
    for parameter in unet.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval()


def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    text = torch.randn(2, 4, 16, generator=generator)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    image = torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)
    return x, torch.tensor([5, 900]), text, mask, image


@pytest.mark.parametrize("pooled", [False, True])
def test_an_untrained_adapter_changes_no_bit_but_has_a_gradient(pooled):
    unet = make_unet(pooled=pooled)
    encoder = ImageEncoder(dim=16)
    network = ImagePromptUNet.from_unet(unet, encoder.tokens)
    x, t, text, mask, image = inputs()
    context, image_mask = encoder([image, ""])
    out = network(x, t, torch.cat([context, text], 1), torch.cat([image_mask, mask], 1))
    assert torch.equal(out, unet(x, t, text, mask))
    out.square().mean().backward()
    adapter = dict(network.named_parameters())
    values = [name for name in adapter if name.endswith("to_v_image.weight")]
    assert len(values) == 6 and all(adapter[name].grad.abs().max() > 0 for name in values)
    assert 2 * len(values) == len(network.adapter_parameters())


@torch.no_grad()
def test_the_output_is_the_sum_of_two_attentions():
    torch.manual_seed(0)
    attention = DecoupledAttention(32, 16, heads=4, image_tokens=3)
    torch.nn.init.normal_(attention.to_v_image.weight)
    x, context = torch.randn(2, 9, 32), torch.randn(2, 8, 16)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 6:] = mask[1, 1:3] = False
    parts = []
    for names, tokens in (
        (("to_k", "to_v"), slice(3, None)), (("to_k_image", "to_v_image"), slice(3))
    ):
        plain = Attention(32, 16, heads=4)
        plain.to_q = attention.to_q
        plain.to_k, plain.to_v = (getattr(attention, name) for name in names)
        plain.to_out = torch.nn.Identity()
        parts.append(plain(x, context[:, tokens], mask[:, tokens]))
    for scale in (0.0, 0.5, 1.0):
        attention.scale = scale
        expected = attention.to_out(parts[0] + scale * parts[1])
        torch.testing.assert_close(attention(x, context, mask), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_scale_0_is_the_unet_alone():
    unet, encoder = make_unet(), ImageEncoder(dim=16)
    network = ImagePromptUNet.from_unet(unet, encoder.tokens)
    for parameter in network.adapter_parameters():
        torch.nn.init.normal_(parameter)
    x, t, text, mask, image = inputs()
    context, image_mask = encoder([image, image])
    arguments = torch.cat([context, text], 1), torch.cat([image_mask, mask], 1)
    assert (network(x, t, *arguments) - unet(x, t, text, mask)).abs().max() > 0.01
    network.set_scale(0)
    torch.testing.assert_close(
        network(x, t, *arguments), unet(x, t, text, mask), rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_a_missing_image_has_the_start_token_alone():
    encoder = ImageEncoder(dim=16)
    *_, image = inputs()
    context, mask = encoder([image, encoder.uncond])
    assert mask.sum(dim=1).tolist() == [encoder.tokens, 1]
    assert torch.allclose(context[:, 0], encoder([""])[0][:, 0])
    assert torch.allclose(context[:1], encoder([image])[0], atol=1e-5)


@pytest.mark.parametrize("image, message", [
    (torch.zeros(3, 32, 32), "float32"), (torch.zeros(1, 32, 32, dtype=torch.uint8), r"\(1, 32"),
    (torch.zeros(3, 30, 32, dtype=torch.uint8), r"\(3, 30, 32\)"), ("番茄", "番茄"),
])
def test_what_is_no_reference_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(dim=16)([image])


def test_images_of_different_sizes_are_refused():
    images = [torch.zeros(3, side, side, dtype=torch.uint8) for side in (32, 64)]
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), \(3, 64, 64\)"):
        ImageEncoder(dim=16)(images)


@torch.no_grad()
def test_padding_at_the_end_of_the_context_has_no_effect():
    """A recorded training step pads its contexts."""
    network = ImagePromptUNet.from_unet(make_unet(), ImageEncoder.tokens)
    for parameter in network.adapter_parameters():
        torch.nn.init.normal_(parameter)
    x, t, text, mask, image = inputs()
    context, image_mask = ImageEncoder(dim=16)([image, ""])
    context, mask = torch.cat([context, text], 1), torch.cat([image_mask, mask], 1)
    padded = torch.nn.functional.pad(context, (0, 0, 0, 3))
    padded_mask = torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(
        network(x, t, padded, padded_mask), network(x, t, context, mask), rtol=0, atol=1e-5
    )


def test_a_unet_without_a_context_is_refused():
    with pytest.raises(ValueError, match="without a context"):
        ImagePromptUNet.from_unet(UNet(channels=(64,)), 5)


def test_the_settings_rebuild_the_network():
    network = ImagePromptUNet.from_unet(make_unet(), 5)
    again = ImagePromptUNet(**network.settings)
    again.load_state_dict(network.state_dict())
    assert again.image_tokens == 5


def test_training_moves_the_adapter_alone_and_the_image_is_followed():
    """The target is a constant image of the level of the reference image; the caption is fixed."""
    unet = make_unet(channels=(64,), attention=(True,), pooled=False, patch=2)
    text = CharacterEncoder("汤", dim=16, layers=1)
    network = ImagePromptUNet.from_unet(unet, ImageEncoder.tokens).requires_grad_(False)
    for parameter in network.adapter_parameters():
        parameter.requires_grad_(True)
    before = copy.deepcopy(network.state_dict())
    encoder = JointEncoder(ImageEncoder(dim=16, width=16), text.requires_grad_(False))
    levels = torch.randint(256, (16, 1, 1, 1), dtype=torch.uint8)
    images = levels.expand(16, 3, 8, 8).contiguous()
    captions = [(level.expand(3, 16, 16).contiguous(), "汤") for level in levels]
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    losses = [
        step.loss for step in train(
            network, diffusion, [(images, captions)], encoder, steps=60, learning_rate=5e-3,
            caption_dropout=0.1,
        )
    ]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("_image." not in name), name
