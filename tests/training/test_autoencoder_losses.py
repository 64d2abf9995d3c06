"""The terms of the autoencoder's loss, against closed forms and torchvision."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from easy_diffusion.training.autoencoder_losses import (
    LPIPS,
    FeatureDistance,
    PatchDiscriminator,
    adaptive_weight,
    build_perceptual,
    discriminator_loss,
    laplacian_pyramid,
    structure_loss,
)


def random_images(count=2, size=32, seed=0):
    """Uniform in [-1, 1], [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


def test_the_image_follows_from_its_laplacian_pyramid():
    x = random_images().double()
    pyramid = laplacian_pyramid(x, 4)
    assert [level.shape[-1] for level in pyramid] == [32, 16, 8, 4]
    restored = pyramid[-1]
    for details in reversed(pyramid[:-1]):
        enlarged = nn.functional.interpolate(
            restored, scale_factor=2, mode="bilinear", align_corners=False
        )
        restored = enlarged + details
    torch.testing.assert_close(restored, x, rtol=0, atol=1e-12)


def test_structure_penalizes_blur_more_than_brightness():
    """A blur and a change of brightness with the same mean absolute difference."""
    sharp = torch.zeros(1, 3, 64, 64)
    sharp[..., ::16, :] = 1.0                                   # thin lines
    sharp[..., :, ::16] = 1.0
    padded = nn.functional.pad(sharp, (2, 2, 2, 2), mode="circular")
    blurred = nn.functional.avg_pool2d(padded, 5, stride=1)
    difference = (sharp - blurred).abs().mean()
    brighter = sharp + difference
    assert float((sharp - brighter).abs().mean()) == pytest.approx(float(difference), rel=1e-4)
    assert structure_loss(sharp, blurred) > 1.5 * structure_loss(sharp, brighter)
    assert structure_loss(sharp, sharp) == 0
    with pytest.raises(ValueError, match="multiples of 8, not \\(36, 32\\)"):
        structure_loss(sharp[..., :36, :32], sharp[..., :36, :32])


def test_the_discriminator_judges_each_patch_and_each_image_alone():
    """A logit depends on 26×26 pixels, but for the normalization, and on no other image."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=32)
    x = random_images(2, 64)
    logits = discriminator(x)
    assert logits.shape == (2, 1, 16, 16)
    torch.testing.assert_close(discriminator(x[:1]), logits[:1], rtol=0, atol=3e-6)

    layers = [layer for layer in discriminator.layers if not isinstance(layer, nn.GroupNorm)]
    without_normalization = nn.Sequential(*layers)
    x = x.clone().requires_grad_()
    without_normalization(x)[0, 0, 8, 8].backward()
    rows = x.grad[0].abs().sum(dim=(0, 2)).nonzero()[:, 0]
    assert int(rows.max() - rows.min()) + 1 == 26
    assert x.grad[1].abs().max() == 0


def test_the_hinge_loss_in_closed_form():
    real = torch.tensor([2.0, 0.5])
    fake = torch.tensor([-2.0, 0.0])
    expected = ((0 + 0.5) / 2 + (0 + 1) / 2) / 2                # 0.375
    assert float(discriminator_loss(real, fake)) == pytest.approx(expected)


def test_the_adaptive_weight_makes_two_gradients_equally_long():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = (5 * weight).sum()
    adversarial = (0.1 * weight).sum()
    factor = adaptive_weight(reconstruction, adversarial, weight)
    assert float(factor) == pytest.approx(50, rel=1e-2)
    assert not factor.requires_grad
    assert float(adaptive_weight(reconstruction, 0 * adversarial, weight)) == 1e4


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """The two files of LPIPS with random weights: VGG16, and one weight for each channel."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    vgg = torchvision.models.vgg16().state_dict()
    features = {name: tensor for name, tensor in vgg.items() if name.startswith("features.")}
    torch.save(features, folder / "vgg16.pth")
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1)
        for i, channels in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(linear, folder / "vgg.pth")
    return folder


def test_lpips_equals_its_definition(lpips_files):
    """Zhang et al. 2018, equation 1, with torchvision's own network and its feature extractor."""
    lpips = LPIPS(lpips_files / "vgg16.pth", lpips_files / "vgg.pth")
    vgg = torchvision.models.vgg16()
    vgg.load_state_dict(torch.load(lpips_files / "vgg16.pth", weights_only=True), strict=False)
    names = {f"features.{i}": str(i) for i in (3, 8, 15, 22, 29)}
    extractor = create_feature_extractor(vgg.eval(), names)
    linear = torch.load(lpips_files / "vgg.pth", weights_only=True)
    to_vgg = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x = random_images(2, 64)
    y = random_images(2, 64, seed=1)
    with torch.no_grad():
        features_x = extractor(to_vgg((x + 1) / 2))
        features_y = extractor(to_vgg((y + 1) / 2))
        expected = torch.zeros(2)
        for i, name in enumerate(names.values()):
            a = nn.functional.normalize(features_x[name], dim=1)
            b = nn.functional.normalize(features_y[name], dim=1)
            weighted = nn.functional.conv2d((a - b) ** 2, linear[f"lin{i}.model.1.weight"])
            expected += weighted.mean(dim=(1, 2, 3))
    # LPIPS rounds the mean and the standard deviation of the images to three digits.
    torch.testing.assert_close(lpips(x, y), expected, rtol=2e-3, atol=0)
    assert lpips(x, x).abs().max() == 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    y = y.clone().requires_grad_()
    lpips(x, y).sum().backward()
    assert y.grad.abs().max() > 0


def test_lpips_refuses_other_files(lpips_files, tmp_path):
    vgg = lpips_files / "vgg16.pth"
    linear = lpips_files / "vgg.pth"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LPIPS(tmp_path / "nowhere", linear)
    with pytest.raises(ValueError, match="does not hold torchvision's VGG16"):
        LPIPS(linear, linear)
    with pytest.raises(ValueError, match="no lin0.model.1.weight"):
        LPIPS(vgg, vgg)
    (tmp_path / "truncated.pth").write_bytes(linear.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        LPIPS(vgg, tmp_path / "truncated.pth")


class TwoMaps(nn.Module):
    """A network with two feature maps: the image, and its 2×2 means with a fourth channel."""

    def feature_maps(self, x):
        small = nn.functional.avg_pool2d(x, 2)
        return [x, torch.cat([small, small[:, :1] ** 2], dim=1)]


def test_the_feature_distance_is_its_formula():
    x, y = random_images(seed=0).double(), random_images(seed=1).double()
    expected = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(TwoMaps().feature_maps(x), TwoMaps().feature_maps(y)):
        cosine = nn.functional.cosine_similarity(a, b, dim=1)       # |a - b|² = 2 - 2 cos
        expected += (2 - 2 * cosine).mean(dim=(1, 2)) / 2
    torch.testing.assert_close(FeatureDistance(TwoMaps())(x, y), expected, rtol=0, atol=1e-8)
    assert FeatureDistance(TwoMaps())(x, x).tolist() == [0.0, 0.0]


def test_efficientnet_is_built_by_its_name():
    distance = build_perceptual("efficientnet")
    x = random_images(size=64)
    blurred = nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    assert distance(x, x).abs().max() == 0
    assert (distance(x, blurred) > 0.1).all()
    assert build_perceptual(None) is None and build_perceptual(distance) is distance
    with pytest.raises(ValueError, match="not 'vgg'"):
        build_perceptual("vgg")
