import numpy as np
import pytest
import torch

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, Dishes, attributes
from easy_diffusion.evaluation.attribute_classifier import (
    AttributeClassifier,
    augment,
    classifier_features,
    prompt_accuracy,
    train_attribute_classifier,
)
from easy_diffusion.evaluation.metrics import frechet_distance, kernel_distance, psnr, sharpness, ssim


def test_fully_right_means_all_ingredients_no_others_and_the_way():
    reader = AttributeClassifier(["番茄", "鸡蛋"], ["炒", "汤"])
    seen = [(frozenset({"番茄", "鸡蛋"}), "炒")] * 2 + [(frozenset({"番茄"}), "炒"), (frozenset({"番茄", "鸡蛋"}), "汤")]
    reader.read = lambda pictures: seen
    dishes = [(("鸡蛋", "番茄"), "炒"), (("番茄",), "炒"), (("番茄", "鸡蛋"), "炒"), (("番茄", "鸡蛋"), "炒")]
    right = reader.exact_matches(torch.zeros(4), dishes)
    assert right == [True, False, False, False] and prompt_accuracy(right) == 0.25
    with pytest.raises(ValueError, match="4 pictures, but 1"):
        reader.exact_matches(torch.zeros(4), dishes[:1])


def test_it_learns_to_read():
    """Five ingredients and three ways in 120 steps; a guess would be right once in 45 times."""
    torch.manual_seed(0)
    few = [d for d in Dishes(6000, 32) if set(attributes(d[1]).ingredients) <= {"番茄", "生菜", "木耳", "豆腐", "胡萝卜"}
           and attributes(d[1]).way in ("炒", "砂锅", "面")]
    learn, test = few[:-40], few[-40:]
    reader = AttributeClassifier(INGREDIENTS, WAYS, width=16)
    losses = list(train_attribute_classifier(reader, torch.utils.data.DataLoader(learn, 32, shuffle=True), attributes, steps=120, learning_rate=4e-3))
    assert len(losses) == 120 and losses[-1] < losses[0] / 4
    right = reader.exact_matches(torch.stack([p for p, _ in test]), [attributes(n) for _, n in test])
    assert prompt_accuracy(right) > 0.5


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="no share"):
        prompt_accuracy([])
    with pytest.raises(ValueError, match="no batch"):
        next(train_attribute_classifier(AttributeClassifier(["番茄"], ["炒"]), [], attributes))


def test_blurring_keeps_the_picture_recognisable():
    pictures = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    out = augment(pictures)
    assert out.shape == pictures.shape and 0.1 < (out - 128).abs().mean() < 10
    stripes = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 255
    contrast = augment(stripes).std(dim=(1, 2, 3))
    assert 0.2 < (contrast < 80).float().mean() < 0.8                       # about half lose their stripes, half keep them


def heap(count, dim, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_equals_its_formula_by_the_eigenvalues_of_the_product():
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    a, b = heap(400, 6, 0) @ mix, heap(300, 6, 1, 0.3)
    covariances = [torch.cov(x.T).numpy() for x in (a, b)]
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + (
        (covariances[0] + covariances[1]).trace() - 2 * np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(heap(50_000, 1, 0), heap(50_000, 1, 1, 2.0, 3.0)) == pytest.approx(2 ** 2 + (3 - 1) ** 2, rel=0.03)
    few = heap(20, 64, 2)                                       # fewer pictures than features: 45 zeros, whose roots are 1e-8 off
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_equals_its_definition():
    a, b = heap(9, 3, 0), heap(9, 3, 1, 0.5)
    def k(x, y):
        return float((x @ y / 3 + 1) ** 3)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = sum(k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i, j in pairs) / len(pairs)
    assert kernel_distance(a, b)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_kernel_distance_has_no_bias_and_knows_its_error(shift):
    """200 repetitions: the mean agrees with the true value, and the stated error with how much they scatter."""
    results = torch.tensor([kernel_distance(heap(60, 4, 2 * i), heap(60, 4, 2 * i + 1, shift)) for i in range(200)], dtype=torch.float64)
    values, errors = results.T
    true, _ = kernel_distance(heap(6000, 4, 1000), heap(6000, 4, 1001, shift))
    assert float(values.mean()) == pytest.approx(true, abs=4 * float(values.std()) / 200 ** 0.5 + 1e-3)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.3)


def test_features_come_from_the_reader_and_wrong_ones_are_refused():
    reader = AttributeClassifier(["番茄"], ["炒", "汤"], width=8)
    features = classifier_features(reader, torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (7, 128) and features.dtype == torch.float64
    with pytest.raises(ValueError, match="not 7 and 6"):
        kernel_distance(features, features[:6])
    with pytest.raises(ValueError, match=r"not \(7, 128\) and \(7, 64\)"):
        frechet_distance(features, features[:, :64])


def test_psnr_and_ssim_equal_their_definitions():
    """Window by window, in float64."""
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (2, 3, 16, 14)).astype(np.uint8)
    b = np.clip(a + generator.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    weight = np.exp(-np.arange(-5, 6.0) ** 2 / 4.5)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    x, y, similar = a.astype(float), b.astype(float), np.zeros((2, 3, 6, 4))
    for i, k, row, column in np.ndindex(*similar.shape):
        p, q = (picture[i, k, row:row + 11, column:column + 11] for picture in (x, y))
        p_mean, q_mean = (weight * p).sum(), (weight * q).sum()
        p_var, q_var = (weight * (p - p_mean) ** 2).sum(), (weight * (q - q_mean) ** 2).sum()
        both = (weight * (p - p_mean) * (q - q_mean)).sum()
        similar[i, k, row, column] = (2 * p_mean * q_mean + 6.5025) * (2 * both + 58.5225) / (
            (p_mean ** 2 + q_mean ** 2 + 6.5025) * (p_var + q_var + 58.5225))
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    torch.testing.assert_close(ssim(a, b).double(), torch.from_numpy(similar.mean(axis=(1, 2, 3))), rtol=0, atol=1e-4)
    expected = 10 * np.log10(255 ** 2 / ((x - y) ** 2).mean(axis=(1, 2, 3)))
    torch.testing.assert_close(psnr(a, b).double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert (ssim(a, a) == 1).all() and psnr(a, a).isinf().all()


def test_blur_costs_sharpness_and_brightness_does_not():
    picture = Dishes(1, 64)[0][0][None]
    soft = torch.nn.functional.avg_pool2d(picture.float(), 3, stride=1, padding=1).byte()
    assert sharpness(soft) < 0.6 * sharpness(picture)
    torch.testing.assert_close(sharpness(picture // 2 + 20), sharpness(picture) / 2, rtol=0.02, atol=0)
