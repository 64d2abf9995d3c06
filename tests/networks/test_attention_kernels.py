"""Each attention kernel gives the numbers of the formula softmax(QKᵀ / sqrt(d)) V."""

import pytest
import torch
import torch.nn.functional as F

from easy_diffusion.networks import attention_kernels
from easy_diffusion.networks.attention_kernels import (
    attend,
    attention_weights,
    chunked_attention,
    plain_attention,
)
from easy_diffusion.networks.blocks import Attention


def formula(q, k, v, mask):
    """softmax(QKᵀ / sqrt(d)) V in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        keys = torch.arange(k.shape[2]) if mask is None else mask[b].nonzero()[:, 0]
        for head in range(q.shape[1]):
            for n in range(q.shape[2]):
                scores = k[b, head, keys] @ q[b, head, n] / q.shape[-1] ** 0.5  # [L]
                weights = scores.exp() / scores.exp().sum()  # [L]
                out[b, head, n] = weights @ v[b, head, keys]
    return out.float()


def make_inputs(masked):
    """q [5, 2, 12, 8], k and v [5, 2, 6, 8], mask [5, 6] or None."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 2, 12, 8, generator=generator)
    k = torch.randn(5, 2, 6, 8, generator=generator)
    v = torch.randn(5, 2, 6, 8, generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [2], [5]]) if masked else None
    return q, k, v, mask


def count_calls(monkeypatch, module, name):
    """A list that grows by one at each call of a module's function."""
    function = getattr(module, name)
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("masked", [True, False])
def test_plain_attention_is_the_formula_and_its_weights_sum_to_1(masked):
    q, k, v, mask = make_inputs(masked)
    expected = formula(q, k, v, mask)
    torch.testing.assert_close(plain_attention(q, k, v, mask), expected, rtol=0, atol=1e-6)
    sums = attention_weights(q, k, mask).sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones(5, 2, 12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_attention_of_a_few_images_at_a_time_gives_the_same(masked, chunk, monkeypatch):
    q, k, v, mask = make_inputs(masked)
    monkeypatch.setattr(attention_kernels, "MAX_SCORES", 2 * 12 * 6 * chunk)
    calls = count_calls(monkeypatch, attention_kernels, "plain_attention")
    out = chunked_attention(q, k, v, mask)
    assert len(calls) == -(-5 // chunk)
    torch.testing.assert_close(out, formula(q, k, v, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kernel, max_keys", [("chunked", 512), ("fused", 5)])
def test_either_kernel_gives_the_same_numbers_and_gradients(masked, kernel, max_keys, monkeypatch):
    q, k, v, mask = make_inputs(masked)
    inputs = [y.requires_grad_(True) for y in (q, k, v)]
    expected = plain_attention(q, k, v, mask)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setattr(attention_kernels, "MAX_PLAIN_KEYS", max_keys)
    calls = count_calls(monkeypatch, F, "scaled_dot_product_attention")
    out = attend(q, k, v, mask)
    assert len(calls) == (kernel == "fused")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_keys", [512, 5])
def test_one_context_and_one_mask_serve_all_images(max_keys, monkeypatch):
    q, k, v, mask = make_inputs(masked=True)
    monkeypatch.setattr(attention_kernels, "MAX_PLAIN_KEYS", max_keys)
    out = attend(q, k[2:3], v[2:3], mask[2:3])
    repeated = (y[2:3].expand(5, *y.shape[1:]) for y in (k, v, mask))
    torch.testing.assert_close(out, formula(q, *repeated), rtol=0, atol=1e-6)


def test_large_images_take_the_fused_attention_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    attention = Attention(16, heads=2)
    x = torch.randn(1, 600, 16)
    calls = count_calls(monkeypatch, F, "scaled_dot_product_attention")
    out = attention(x)
    assert calls

    layers = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in layers)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = attention.to_out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
