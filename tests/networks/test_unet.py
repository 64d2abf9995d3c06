"""UNet and its blocks against torch and diffusers."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch.autograd.graph import saved_tensors_hooks

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.blocks import (
    Attention,
    ResidualBlock,
    SpatialTransformer,
    timestep_embedding,
)
from easy_diffusion.networks.stable_diffusion_weights import save_stable_diffusion
from easy_diffusion.networks.unet import UNet, masked_mean
from easy_diffusion.networks.weights_io import check_settings


def without_zeros(module):
    """Fill the layers that begin at zero, so that every branch has an effect; eval mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


def small_unet(**options):
    """A UNet of two levels with a context of dimension 16."""
    return without_zeros(UNet(**dict(channels=(32, 64), context_dim=16) | options))


# ---------------------------------------------------------------- blocks


def test_time_embedding_equals_diffusers():
    t = torch.tensor([0, 1, 500, 999])
    expected = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    # The angles reach 999 radians, in float32.
    torch.testing.assert_close(timestep_embedding(t, 64), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("context_dim", [None, 24])
def test_attention_equals_torch(context_dim):
    torch.manual_seed(0)
    attention = Attention(32, context_dim, heads=4)
    x = torch.randn(2, 10, 32)
    context, mask, attn_mask = None, None, None
    if context_dim:
        context = torch.randn(2, 6, 24)
        mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        attn_mask = mask[:, None, None]

    def split(y):
        return y.unflatten(-1, (4, 8)).transpose(1, 2)

    source = x if context is None else context
    q = split(attention.to_q(x))
    k = split(attention.to_k(source))
    v = split(attention.to_v(source))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    expected = attention.to_out(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, context, mask), expected, rtol=0, atol=1e-6)


def test_a_new_network_predicts_zero_and_new_blocks_are_the_identity():
    x = torch.randn(2, 32, 8, 8)
    assert UNet(channels=(32,))(torch.randn(1, 3, 8, 8), torch.tensor([1])).abs().max() == 0
    torch.testing.assert_close(ResidualBlock(32, 32, 64)(x, torch.randn(2, 64)), x)
    torch.testing.assert_close(SpatialTransformer(32)(x), x)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("options, shape", [
    (dict(channels=(32, 64)), (2, 3, 16, 24)),
    (dict(channels=(32, 64, 64), blocks=1, attention=(False, False, True)), (2, 3, 32, 32)),
    (dict(channels=(32, 64), patch=4, pooled=True), (2, 3, 64, 64)),
    (dict(channels=(32,), in_channels=9, out_channels=4), (2, 9, 8, 8)),
])
def test_the_output_has_the_size_of_the_input_and_every_weight_has_a_gradient(options, shape):
    torch.manual_seed(0)
    network = small_unet(**options)
    x = torch.randn(shape)
    mask = torch.ones(2, 5, dtype=torch.bool)
    out = network(x, torch.tensor([3, 700]), torch.randn(2, 5, 16), mask)
    assert out.shape == (2, options.get("out_channels", 3), *shape[2:])
    out.square().sum().backward()
    without_gradient = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or parameter.grad.abs().max() == 0
    ]
    assert without_gradient == []


def test_a_network_without_a_context_dim_needs_no_context():
    network = small_unet(context_dim=None)
    assert network(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 3, 16, 16)


def test_padding_is_never_attended_to():
    network = small_unet(pooled=True)
    t = torch.tensor([3, 700])
    x = torch.randn(2, 3, 16, 16)
    context = torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    other_padding = torch.where(mask[..., None], context, torch.full_like(context, 100.0))
    out = network(x, t, context, mask)
    torch.testing.assert_close(out, network(x, t, other_padding, mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(out, network(x, t, context[:, :3]), rtol=0, atol=1e-5)
    assert not torch.allclose(out, network(x, t, context), atol=1e-3)


def test_masked_mean_leaves_padding_out():
    context = torch.tensor([[[2.0], [4.0], [99.0]]])
    mask = torch.tensor([[True, True, False]])
    assert masked_mean(context, mask).tolist() == [[3.0]]
    assert masked_mean(context[:, :2], None).tolist() == [[3.0]]


def test_a_masked_context_equals_diffusers(tmp_path):
    network = small_unet(attention=(True, False))
    save_stable_diffusion(network, tmp_path)
    peer = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    context = torch.randn(2, 6, 16)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    expected = peer(x, t, context, encoder_attention_mask=mask).sample
    torch.testing.assert_close(network(x, t, context, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_checkpointing_keeps_less_memory_and_gives_the_same_gradients(learned):
    options = dict(channels=(32, 64), context_dim=16, out_channels=6 if learned else 3)
    network = without_zeros(UNet(**options)).train()
    checkpointed = UNet(**options, checkpointing=True)
    checkpointed.load_state_dict(network.state_dict())
    variance = "learned_range" if learned else "fixed_small"
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), variance=variance)
    x0 = torch.randn(4, 3, 16, 16).clamp(-1, 1)
    t = torch.tensor([3, 100, 500, 900])
    context = torch.randn(4, 5, 16)

    def saved_bytes(module):
        """Compute the gradients; return the size of what was kept for them."""
        total = 0

        def pack(y):
            nonlocal total
            total += y.nbytes
            return y

        with saved_tensors_hooks(pack, lambda y: y):
            generator = torch.Generator().manual_seed(0)
            loss = diffusion.loss(module, x0, t, context, generator=generator).mean()
        loss.backward()
        return total

    assert saved_bytes(checkpointed) < 0.5 * saved_bytes(network)
    for a, b in zip(network.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_in_eval_mode():
    network = without_zeros(UNet(channels=(32,), dropout=0.5))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.allclose(network(x, t), network(x, t))


def test_dropout_and_heads_are_those_of_every_block():
    network = UNet(channels=(32, 64), context_dim=16, dropout=0.3, heads=2)
    layers = list(network.modules())
    dropouts = {layer.dropout.p for layer in layers if isinstance(layer, ResidualBlock)}
    heads = {layer.heads for layer in layers if isinstance(layer, Attention)}
    assert (dropouts, heads) == ({0.3}, {2})


def test_a_class_label_is_a_context_of_one_token():
    torch.manual_seed(0)
    network = without_zeros(UNet(channels=(32,), context_dim=8, pooled=True))
    classes = torch.nn.Embedding(10, 8)
    x = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    t = torch.tensor([1]).expand(3)
    class_4, class_7, class_4_again = network(x, t, classes(torch.tensor([4, 7, 4]))[:, None])
    assert not torch.allclose(class_4, class_7, atol=1e-3)
    torch.testing.assert_close(class_4, class_4_again)


def test_the_first_versions_network_has_its_size():
    with torch.device("meta"):
        fixed = UNet.easy_diffusion_2023()
        learned = UNet.easy_diffusion_2023(learned_variance=True)
    assert sum(parameter.numel() for parameter in fixed.parameters()) == 92_773_123
    assert sum(parameter.numel() for parameter in learned.parameters()) == 92_776_582
    with torch.device("meta"):
        x = torch.empty(2, 3, 128, 128)
        t = torch.empty(2, dtype=torch.long)
        context = torch.empty(2, 52, 768)
        assert fixed(x, t, context).shape == (2, 3, 128, 128)
        assert learned(x, t, context).shape == (2, 6, 128, 128)


# ---------------------------------------------------------------- one caption per image


@pytest.mark.parametrize("pooled", [True, False])
def test_one_caption_serves_all_images_and_several_do_not_fit(pooled):
    network = small_unet(pooled=pooled)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([3, 500, 700])
    context, mask = torch.randn(1, 4, 16), torch.tensor([[True, True, True, False]])
    expected = network(x, t, context.expand(3, -1, -1), mask.expand(3, -1))
    torch.testing.assert_close(network(x, t, context, mask), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="6 captions does not fit 3 images"):
        network(x, t, torch.randn(6, 4, 16))


# ---------------------------------------------------------------- settings


def test_settings_are_all_arguments_and_rebuild_the_network():
    arguments = inspect.signature(UNet).parameters.keys()
    network = UNet(1, 2, [32, 64], 8, 1, [False, True], 2, 2, True, 0.1, True)
    assert network.settings.keys() == arguments
    assert UNet(**network.settings).settings == network.settings
    restored = json.loads(json.dumps(network.settings))
    check_settings(restored, UNet(**restored))


# ---------------------------------------------------------------- errors


def call_with_context(context):
    network = UNet(channels=(32,), context_dim=4)
    return network(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), context)


def call_with_an_odd_height():
    network = UNet(channels=(32, 64), patch=2)
    return network(torch.randn(1, 3, 30, 32), torch.tensor([1]))


@pytest.mark.parametrize("call, message", [
    (lambda: UNet(pooled=True), "context_dim"),
    (lambda: call_with_context(torch.zeros(3, 1, 4)), "3 captions"),
    (lambda: call_with_context(None), "needs a context"),
    (lambda: UNet(channels=(48,)), "multiples of 32"),
    (lambda: UNet(channels=(32, 64), attention=(True,)), "one entry a level"),
    (lambda: Attention(30, heads=4), "4 heads"),
    (call_with_an_odd_height, "multiples of 4"),
])
def test_wrong_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_without_a_token_is_refused_with_its_rows():
    """A softmax over no keys is NaN."""
    network = UNet(channels=(32,), blocks=1, context_dim=16)
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="no True in the rows .1."):
        network(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 2, 16), mask)
