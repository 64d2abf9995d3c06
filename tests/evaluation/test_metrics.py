"""The distances and the image metrics equal their definitions."""

import numpy as np
import pytest
import torch

from datasets.dishes import Dishes
from easy_diffusion.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    psnr,
    seam,
    sharpness,
    ssim,
)


def gaussian_samples(count, dim, seed, mean=0.0, std=1.0):
    """float64 [count, dim]"""
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, dim, generator=generator, dtype=torch.float64)


def test_frechet_distance_equals_its_formula_by_the_eigenvalues_of_the_product():
    mixing = gaussian_samples(6, 6, seed=5)
    a = gaussian_samples(400, 6, seed=0) @ mixing
    b = gaussian_samples(300, 6, seed=1, mean=0.3) @ mixing
    covariance_a, covariance_b = (torch.cov(x.T).numpy() for x in (a, b))
    mean_term = float((a.mean(dim=0) - b.mean(dim=0)).square().sum())
    root_trace = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real).sum()
    expected = mean_term + (covariance_a + covariance_b).trace() - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_gaussians_in_closed_form():
    a = gaussian_samples(50_000, 1, seed=0)
    b = gaussian_samples(50_000, 1, seed=1, mean=2.0, std=3.0)
    assert frechet_distance(a, b) == pytest.approx(2 ** 2 + (3 - 1) ** 2, rel=0.03)


def test_frechet_distance_works_with_fewer_images_than_features():
    """45 eigenvalues of the covariance are 0; their square roots have errors of 1e-8."""
    few = gaussian_samples(20, 64, seed=2)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_equals_its_definition():
    a = gaussian_samples(9, 3, seed=0)
    b = gaussian_samples(9, 3, seed=1, mean=0.5)

    def k(x, y):
        return float((x @ y / 3 + 1) ** 3)

    h = [
        k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i])
        for i in range(9) for j in range(9) if i != j
    ]
    assert kernel_distance(a, b)[0] == pytest.approx(sum(h) / len(h), rel=1e-12)


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.5])
def test_kernel_distance_is_unbiased_and_states_its_standard_error(mean):
    """In 200 repetitions the mean agrees with the true value, and the error with the scatter."""
    results = []
    for i in range(200):
        a = gaussian_samples(60, 4, seed=2 * i)
        b = gaussian_samples(60, 4, seed=2 * i + 1, mean=mean)
        results.append(kernel_distance(a, b))
    distances, errors = torch.tensor(results, dtype=torch.float64).T
    true_distance, _ = kernel_distance(
        gaussian_samples(6000, 4, seed=1000), gaussian_samples(6000, 4, seed=1001, mean=mean)
    )
    tolerance = 4 * float(distances.std()) / 200 ** 0.5 + 1e-3
    assert float(distances.mean()) == pytest.approx(true_distance, abs=tolerance)
    root_mean_square_error = float(errors.square().mean().sqrt())
    assert root_mean_square_error == pytest.approx(float(distances.std()), rel=0.3)


def test_features_of_wrong_shapes_are_refused():
    features = gaussian_samples(7, 128, seed=0)
    with pytest.raises(ValueError, match="not 7 and 6"):
        kernel_distance(features, features[:6])
    with pytest.raises(ValueError, match=r"not \(7, 128\) and \(7, 64\)"):
        frechet_distance(features, features[:, :64])


def test_psnr_and_ssim_equal_their_definitions():
    """SSIM is computed window by window, in float64."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 3, 16, 14)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    x = a.astype(float)
    y = b.astype(float)
    line = np.exp(-np.arange(-5, 6.0) ** 2 / 4.5)
    weight = np.outer(line, line) / line.sum() ** 2
    c = 6.5025
    d = 58.5225
    similarity = np.zeros((2, 3, 6, 4))
    for i, channel, row, column in np.ndindex(*similarity.shape):
        p = x[i, channel, row:row + 11, column:column + 11]
        q = y[i, channel, row:row + 11, column:column + 11]
        p_mean = (weight * p).sum()
        q_mean = (weight * q).sum()
        p_var = (weight * (p - p_mean) ** 2).sum()
        q_var = (weight * (q - q_mean) ** 2).sum()
        covariance = (weight * (p - p_mean) * (q - q_mean)).sum()
        similarity[i, channel, row, column] = (
            (2 * p_mean * q_mean + c) * (2 * covariance + d)
            / ((p_mean ** 2 + q_mean ** 2 + c) * (p_var + q_var + d))
        )
    a = torch.from_numpy(a)
    b = torch.from_numpy(b)
    expected = torch.from_numpy(similarity.mean(axis=(1, 2, 3)))
    torch.testing.assert_close(ssim(a, b).double(), expected, rtol=0, atol=1e-4)
    expected = torch.from_numpy(10 * np.log10(255 ** 2 / ((x - y) ** 2).mean(axis=(1, 2, 3))))
    torch.testing.assert_close(psnr(a, b).double(), expected, rtol=1e-5, atol=0)
    assert (ssim(a, a) == 1).all()
    assert psnr(a, a).isinf().all()


def test_blur_lowers_sharpness_and_brightness_does_not():
    image = Dishes(1, 64)[0][0][None]
    blurred = torch.nn.functional.avg_pool2d(image.float(), 3, stride=1, padding=1).byte()
    assert sharpness(blurred) < 0.6 * sharpness(image)
    half_contrast = image // 2 + 20
    torch.testing.assert_close(sharpness(half_contrast), sharpness(image) / 2, rtol=0.02, atol=0)


def test_a_seam_is_the_step_at_the_border_over_the_steps_beside_it():
    ramp = torch.arange(0, 96, 3)[None].expand(32, 32)              # 3 levels a pixel to the right
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, 20:] = True
    brighter = ramp + 12 * mask
    images = torch.stack([ramp, brighter])[:, None].expand(2, 3, 32, 32).byte()
    # Of the pairs beside the border half are horizontal, with 3 levels, and half are vertical.
    pairs = 7 * 32 + 8 * 31
    beside = 3 * 7 * 32 / pairs
    expected = torch.tensor([3, 3 + 12]) / beside
    torch.testing.assert_close(seam(images, mask), expected, rtol=1e-5, atol=0)


def test_noise_has_no_seam_wherever_the_border_is():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:40, 10:50] = True
    torch.testing.assert_close(seam(images, mask), torch.ones(4), rtol=0, atol=0.1)
    torch.testing.assert_close(seam(images, ~mask), seam(images, mask), rtol=0, atol=0.05)
    assert seam(images, torch.zeros_like(mask)).isnan().all()
