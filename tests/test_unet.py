import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from easy_diffusion.blocks import Attention, ResidualBlock, SpatialTransformer, timestep_embedding
from easy_diffusion.unet import UNet, masked_mean


def shaken(module):
    """The zeroed layers filled, so that every branch has its say."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


def test_time_embedding_equals_diffusers():
    t = torch.tensor([0, 1, 500, 999])
    expected = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 64), expected, rtol=0, atol=1e-4)      # float32 angles of 999 radians


@pytest.mark.parametrize("context_dim", [None, 24])
def test_attention_equals_torch(context_dim):
    torch.manual_seed(0)
    attention = Attention(32, context_dim, heads=4)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 6, 24) if context_dim else None
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]) if context_dim else None
    q, k, v = (layer(y).unflatten(-1, (4, 8)).transpose(1, 2) for layer, y in (
        (attention.to_q, x), (attention.to_k, x if context is None else context), (attention.to_v, x if context is None else context)))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
    torch.testing.assert_close(attention(x, context, mask), attention.to_out(expected.transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)


def test_large_pictures_take_the_fused_attention_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    attention, x = Attention(16, heads=2), torch.randn(1, 1100, 16)
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    large = attention(x)
    q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v))
    plain = ((q @ k.transpose(-1, -2) / 8 ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert calls
    torch.testing.assert_close(large, attention.to_out(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options, shape", [
    (dict(channels=(32, 64)), (2, 3, 16, 24)),
    (dict(channels=(32, 64, 64), blocks=1, attention=(False, False, True)), (2, 3, 32, 32)),
    (dict(channels=(32, 64), patch=4, pooled=True), (2, 3, 64, 64)),
    (dict(channels=(32,), in_channels=9, out_channels=4), (2, 9, 8, 8)),
])
def test_the_picture_keeps_its_size_and_every_weight_learns(options, shape):
    torch.manual_seed(0)
    network = shaken(UNet(context_dim=16, **options))
    x, mask = torch.randn(shape), torch.ones(2, 5, dtype=torch.bool)
    out = network(x, torch.tensor([3, 700]), torch.randn(2, 5, 16), mask)
    assert out.shape == (2, options.get("out_channels", 3), *shape[2:])
    out.square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_a_network_without_words_needs_none():
    network = shaken(UNet(channels=(32, 64)))
    assert network(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 3, 16, 16)


def test_padding_is_never_attended_to():
    network, t = shaken(UNet(channels=(32, 64), context_dim=16, pooled=True)), torch.tensor([3, 700])
    x, words = torch.randn(2, 3, 16, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    other = torch.where(mask[..., None], words, torch.full_like(words, 100.0))
    torch.testing.assert_close(network(x, t, words, mask), network(x, t, other, mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(network(x, t, words, mask), network(x, t, words[:, :3]), rtol=0, atol=1e-5)
    assert not torch.allclose(network(x, t, words, mask), network(x, t, words), atol=1e-3)


def test_a_new_network_says_nothing_and_new_blocks_pass_their_input_on():
    x = torch.randn(2, 32, 8, 8)
    assert UNet(channels=(32,))(torch.randn(1, 3, 8, 8), torch.tensor([1])).abs().max() == 0
    torch.testing.assert_close(ResidualBlock(32, 32, 64)(x, torch.randn(2, 64)), x)
    torch.testing.assert_close(SpatialTransformer(32)(x), x)


def test_the_mean_of_the_words_leaves_padding_out():
    words, mask = torch.tensor([[[2.0], [4.0], [99.0]]]), torch.tensor([[True, True, False]])
    assert masked_mean(words, mask).tolist() == [[3.0]]
    assert masked_mean(words[:, :2], None).tolist() == [[3.0]]


@pytest.mark.parametrize("call, says", [
    (lambda: UNet(channels=(48,)), "multiples of 32"),
    (lambda: UNet(channels=(32, 64), attention=(True,)), "one entry a level"),
    (lambda: Attention(30, heads=4), "4 heads"),
    (lambda: UNet(channels=(32, 64), patch=2)(torch.randn(1, 3, 30, 32), torch.tensor([1])), "multiples of 4"),
])
def test_wrong_numbers_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
