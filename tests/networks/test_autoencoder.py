import pytest
import torch

from easy_diffusion.networks.autoencoder import Autoencoder, Posterior


@pytest.mark.parametrize("channels, size", [((32,), 1), ((32, 64), 2), ((32, 32, 64, 64), 8)])
def test_a_latent_is_smaller_by_a_factor_for_each_level(channels, size):
    autoencoder = Autoencoder(channels, latent_channels=3, image_channels=1, blocks=1)
    posterior = autoencoder.encode(torch.randn(2, 1, 16, 32))
    assert autoencoder.factor == size and posterior.mean.shape == posterior.log_variance.shape == (2, 3, 16 // size, 32 // size)
    assert autoencoder.decode(posterior.mean).shape == (2, 1, 16, 32)


def test_the_kl_equals_torch():
    g = torch.Generator().manual_seed(0)
    posterior = Posterior(torch.randn(3, 4, 5, 6, generator=g), torch.randn(3, 4, 5, 6, generator=g))
    ours = torch.distributions.Normal(posterior.mean, (posterior.log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-5, atol=0)


def test_samples_have_the_posteriors_mean_and_deviation_and_follow_their_seed():
    posterior = Posterior(torch.full((20_000, 1, 2, 2), 0.7), torch.full((20_000, 1, 2, 2), -1.0))
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert float(z.mean()) == pytest.approx(0.7, abs=0.01) and float(z.std()) == pytest.approx(0.6065, abs=0.01)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))


def test_every_weight_learns():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 64), blocks=1)
    x = torch.randn(2, 3, 16, 16)
    posterior = autoencoder.encode(x)
    ((autoencoder.decode(posterior.sample()) - x).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    # A bias before a normalisation, or of keys in attention, shifts what is shifted back; its gradient is rounding.
    silent = [name for name, p in autoencoder.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_a_patch_of_pixels_enters_as_one_place():
    torch.manual_seed(0)
    autoencoder, x = Autoencoder((32, 32), blocks=1, patch=4), torch.randn(2, 3, 16, 32)
    assert autoencoder.factor == 8 and autoencoder.encoder.conv_in.in_channels == 48
    back, posterior = autoencoder(x, torch.Generator().manual_seed(0))
    assert posterior.mean.shape == (2, 4, 2, 4) and back.shape == x.shape
    assert torch.equal(back, autoencoder.decode(posterior.sample(torch.Generator().manual_seed(0))))
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.encode(x[..., :12])


@pytest.mark.parametrize("call, says", [
    (lambda: Autoencoder((48,)), "multiples of 32"),
    (lambda: Autoencoder((32, 32)).encode(torch.zeros(1, 3, 15, 16)), "multiples of 2"),
])
def test_wrong_numbers_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
