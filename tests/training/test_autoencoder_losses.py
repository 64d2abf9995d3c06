import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from easy_diffusion.training.autoencoder_losses import (
    LPIPS,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    laplacian_pyramid,
    structure_loss,
)


def pictures(count=2, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_pyramid_is_the_picture_in_other_words():
    x = pictures().double()
    parts = laplacian_pyramid(x, 4)
    assert [part.shape[-1] for part in parts] == [32, 16, 8, 4]
    back = parts[-1]
    for part in reversed(parts[:-1]):
        back = nn.functional.interpolate(back, scale_factor=2, mode="bilinear", align_corners=False) + part
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_structure_minds_blur_more_than_brightness():
    """A blur, and another brightness of the same mean absolute difference."""
    sharp = torch.zeros(1, 3, 64, 64)
    sharp[..., ::16, :] = sharp[..., :, ::16] = 1.0                         # thin lines
    blurred = nn.functional.avg_pool2d(nn.functional.pad(sharp, (2, 2, 2, 2), mode="circular"), 5, stride=1)
    wrong = (sharp - blurred).abs().mean()
    offset = sharp + wrong                                                  # all a little brighter
    assert float((sharp - offset).abs().mean()) == pytest.approx(float(wrong), rel=1e-4)
    with pytest.raises(ValueError, match="multiples of 8, not \\(36, 32\\)"):
        structure_loss(sharp[..., :36, :32], sharp[..., :36, :32])
    assert structure_loss(sharp, blurred) > 1.5 * structure_loss(sharp, offset) and structure_loss(sharp, sharp) == 0


def test_the_discriminator_judges_patches_one_by_one():
    """A change of one pixel reaches the answers of the patches that hold it, 26 pixels wide, but for what the norms carry; and no other
    picture of the batch."""
    torch.manual_seed(0)
    discriminator, x = PatchDiscriminator(width=32), pictures(2, 64)
    answers = discriminator(x)
    assert answers.shape == (2, 1, 16, 16)
    torch.testing.assert_close(discriminator(x[:1]), answers[:1], rtol=0, atol=1e-6)
    without_norms = nn.Sequential(*[layer for layer in discriminator.layers if not isinstance(layer, nn.GroupNorm)])
    changed = x.clone().requires_grad_()
    without_norms(changed)[0, 0, 8, 8].backward()
    rows = changed.grad[0].abs().sum(dim=(0, 2)).nonzero()[:, 0]
    assert int(rows.max() - rows.min()) + 1 == 26 and changed.grad[1].abs().max() == 0


def test_the_hinge_loss_in_closed_form():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])        # ½ ((0 + ½) / 2 + (0 + 1) / 2)
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.375)


def test_the_adaptive_weight_makes_two_pulls_equally_strong():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    ours, theirs = (5 * weight).sum(), (0.1 * weight).sum()
    factor = adaptive_weight(ours, theirs, weight)
    assert float(factor) == pytest.approx(50, rel=1e-2) and not factor.requires_grad
    assert float(adaptive_weight(ours, 0 * theirs, weight)) == 1e4


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the two files of LPIPS: torchvision's VGG16, and five layers of one weight a channel."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    vgg = torchvision.models.vgg16().state_dict()
    torch.save({name: tensor for name, tensor in vgg.items() if name.startswith("features.")}, folder / "vgg16.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(linear, folder / "vgg.pth")
    return folder


def test_lpips_equals_its_definition(weights):
    """Zhang et al. 2018, equation 1, by torchvision's own network and its feature extractor."""
    lpips, vgg = LPIPS(weights / "vgg16.pth", weights / "vgg.pth"), torchvision.models.vgg16()
    vgg.load_state_dict(torch.load(weights / "vgg16.pth", weights_only=True), strict=False)
    names = {f"features.{i}": str(i) for i in (3, 8, 15, 22, 29)}
    extractor = create_feature_extractor(vgg.eval(), names)
    linear = torch.load(weights / "vgg.pth", weights_only=True)
    x, y = pictures(2, 64), pictures(2, 64, seed=1)
    with torch.no_grad():
        to_vgg = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        a, b = (extractor(to_vgg((picture + 1) / 2)) for picture in (x, y))
        expected = torch.zeros(2)
        for depth, name in enumerate(names.values()):
            difference = nn.functional.normalize(a[name], dim=1) - nn.functional.normalize(b[name], dim=1)
            expected += nn.functional.conv2d(difference ** 2, linear[f"lin{depth}.model.1.weight"]).mean(dim=(1, 2, 3))
    torch.testing.assert_close(lpips(x, y), expected, rtol=2e-3, atol=0)      # its mean and deviation are rounded to three digits
    assert not any(parameter.requires_grad for parameter in lpips.parameters()) and lpips(x, x).abs().max() == 0
    moved = y.clone().requires_grad_()
    lpips(x, moved).sum().backward()
    assert moved.grad.abs().max() > 0


def test_other_files_are_no_lpips(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LPIPS(tmp_path / "nowhere", weights / "vgg.pth")
    with pytest.raises(ValueError, match="not torchvision's VGG16"):
        LPIPS(weights / "vgg.pth", weights / "vgg.pth")
    with pytest.raises(ValueError, match="no lin0.model.1.weight"):
        LPIPS(weights / "vgg16.pth", weights / "vgg16.pth")
    (tmp_path / "half.pth").write_bytes((weights / "vgg.pth").read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        LPIPS(weights / "vgg16.pth", tmp_path / "half.pth")
