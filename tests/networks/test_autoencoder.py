"""Autoencoder: shapes, the posterior against torch.distributions, gradients, patches and errors."""

import pytest
import torch

from easy_diffusion.networks.autoencoder import Autoencoder, Posterior


@pytest.mark.parametrize(
    "channels, factor",
    [((32,), 1), ((32, 64), 2), ((32, 32, 64, 64), 8)],
)
def test_each_level_after_the_first_halves_the_latent(channels, factor):
    autoencoder = Autoencoder(channels, latent_channels=3, image_channels=1, blocks=1)
    posterior = autoencoder.encode(torch.randn(2, 1, 16, 32))
    assert autoencoder.factor == factor
    assert posterior.mean.shape == (2, 3, 16 // factor, 32 // factor)
    assert posterior.log_variance.shape == posterior.mean.shape
    assert autoencoder.decode(posterior.mean).shape == (2, 1, 16, 32)


def test_the_kl_equals_torch():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 4, 5, 6, generator=generator)
    log_variance = torch.randn(3, 4, 5, 6, generator=generator)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    torch.testing.assert_close(Posterior(mean, log_variance).kl(), expected, rtol=1e-5, atol=0)


def test_samples_have_the_posteriors_mean_and_std_and_depend_only_on_the_seed():
    shape = (20_000, 1, 2, 2)
    posterior = Posterior(torch.full(shape, 0.7), torch.full(shape, -1.0))
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert float(z.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(z.std()) == pytest.approx(0.6065, abs=0.01)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))
    half = Posterior(torch.zeros(shape).bfloat16(), torch.zeros(shape).bfloat16())
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half.sample(torch.Generator().manual_seed(0)), eps.bfloat16())


def test_every_weight_has_a_gradient():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 64), blocks=1)
    x = torch.randn(2, 3, 16, 16)
    posterior = autoencoder.encode(x)
    reconstruction = autoencoder.decode(posterior.sample())
    loss = (reconstruction - x).square().mean() + 1e-3 * posterior.kl().mean()
    loss.backward()
    # A bias before a normalisation and the bias of the keys have no effect: their gradient is only
    # rounding error, but not exactly 0.
    without_gradient = [
        name
        for name, parameter in autoencoder.named_parameters()
        if parameter.grad is None or parameter.grad.abs().max() == 0
    ]
    assert without_gradient == []


def test_a_patch_of_pixels_enters_as_one_position():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), blocks=1, patch=4)
    x = torch.randn(2, 3, 16, 32)
    assert autoencoder.factor == 8
    assert autoencoder.encoder.conv_in.in_channels == 48
    reconstruction, posterior = autoencoder(x, torch.Generator().manual_seed(0))
    assert posterior.mean.shape == (2, 4, 2, 4)
    assert reconstruction.shape == x.shape
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(reconstruction, autoencoder.decode(z))
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.encode(x[..., :12])


@pytest.mark.parametrize("call, message", [
    (lambda: Autoencoder((48,)), "multiples of 32"),
    (lambda: Autoencoder((32, 32)).encode(torch.zeros(1, 3, 15, 16)), "multiples of 2"),
])
def test_wrong_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
