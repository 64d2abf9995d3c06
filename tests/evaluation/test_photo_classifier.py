"""The linear probe on Gaussian features, nearest neighbours, copies, and all metrics at once."""

import pytest
import torch

from easy_diffusion.evaluation.photo_classifier import (
    PhotoMetrics,
    compute_features,
    copied_fraction,
    nearest_neighbours,
    top_k_accuracy,
    train_linear_probe,
)

NAMES = ["红烧肉", "饺子", "麻婆豆腐"]


def gaussian_classes(count, classes=3, dim=16, distance=3.0, seed=0):
    """Features of equally many of each class around corners of a simplex, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = distance / 2 ** 0.5 * torch.eye(classes, dim)
    return centres[labels] + torch.randn(count, dim, generator=generator), labels


class MeanColours(torch.nn.Module):
    """A network for features: the means of the colours in each quarter of an image."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def coloured_images(names, seed=0):
    """Images uint8 [N, 3, 8, 8], reddish, greenish or bluish by the name."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(100, (len(names), 3, 8, 8), dtype=torch.uint8, generator=generator)
    for image, name in zip(images, names):
        image[NAMES.index(name)] += 120
    return images


@pytest.fixture(scope="module")
def metrics():
    network = MeanColours()
    training_names = NAMES * 40
    unseen_names = NAMES * 40
    training = compute_features(network, coloured_images(training_names, seed=1))
    unseen = compute_features(network, coloured_images(unseen_names, seed=2))
    return PhotoMetrics(network, (training, training_names), (unseen, unseen_names))


def test_the_probe_is_nearly_as_good_as_the_optimal_classifier():
    """The optimal classifier of such Gaussians takes the nearest centre."""
    features, labels = gaussian_classes(1500, seed=0)
    test_features, test_labels = gaussian_classes(3000, seed=1)
    probe = train_linear_probe(features, labels, classes=3)
    nearest_centre = test_features[:, :3]                   # the largest of these coordinates
    optimal = top_k_accuracy(nearest_centre, test_labels, 1)
    accuracy = top_k_accuracy(probe(test_features), test_labels, 1)
    assert optimal - 0.03 < accuracy <= optimal + 0.01


def test_the_probe_does_not_depend_on_scale_and_shift_of_the_features():
    features, labels = gaussian_classes(300)
    probe = train_linear_probe(features, labels, classes=3, epochs=20)
    other = train_linear_probe(1000 * features + 7, labels, classes=3, epochs=20)
    torch.testing.assert_close(
        other(1000 * features + 7), probe(features), rtol=1e-3, atol=1e-3
    )


def test_the_same_seed_gives_the_same_probe():
    features, labels = gaussian_classes(60)
    probes = [train_linear_probe(features, labels, classes=3, epochs=3) for _ in range(2)]
    assert torch.equal(probes[0](features), probes[1](features))


def test_labels_that_do_not_fit_are_named():
    features, labels = gaussian_classes(30)
    with pytest.raises(ValueError, match="30 features, but 29 labels"):
        train_linear_probe(features, labels[:-1], classes=3)
    with pytest.raises(ValueError, match="from 0 to 1, not from 0 to 2"):
        train_linear_probe(features, labels, classes=2)


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 0])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 5)] == [0.0, 0.5, 1.0, 1.0]


def test_nearest_neighbours_are_those_of_a_search_one_by_one():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    distances, index = nearest_neighbours(a, b)
    for i, row in enumerate(a):
        cosines = [torch.cosine_similarity(row, other, dim=0) for other in b]
        assert index[i] == max(range(11), key=lambda k: cosines[k])
        torch.testing.assert_close(distances[i], 1 - cosines[index[i]])


def test_copies_are_found_and_new_samples_are_not():
    generator = torch.Generator().manual_seed(0)
    training = torch.randn(400, 8, generator=generator)
    unseen = torch.randn(2000, 8, generator=generator)
    new = torch.randn(2000, 8, generator=generator)
    copies = training[:50] + 0.01 * torch.randn(50, 8, generator=generator)
    assert copied_fraction(copies, training, unseen)[0] == 1.0
    fraction, threshold = copied_fraction(new, training, unseen, quantile=0.05)
    assert 0.03 < fraction < 0.07                              # standard error 0.005, twice
    assert threshold > 0


def test_all_metrics_at_once(metrics):
    good = metrics.measure(coloured_images(NAMES * 10, seed=3), NAMES * 10)
    assert good["top1"] == good["top5"] == 1.0
    assert good["copied_fraction"] < 0.2
    shuffled = NAMES[1:] + NAMES[:1]
    assert metrics.measure(coloured_images(NAMES * 10, seed=3), shuffled * 10)["top1"] == 0.0
    dark = coloured_images(NAMES * 10, seed=3) // 2
    bad = metrics.measure(dark, NAMES * 10)
    assert bad["kernel_distance"] > 10 * abs(good["kernel_distance"])
    assert bad["frechet_distance"] > 10 * good["frechet_distance"]
    copied = metrics.measure(coloured_images(NAMES * 40, seed=1), NAMES * 40)
    assert copied["copied_fraction"] == 1.0


def test_photographs_are_classified(metrics):
    names = [*NAMES, "饺子"]
    images = coloured_images(names, seed=4)
    assert metrics.classify(images) == names
    assert metrics.accuracy(images, names) == 1.0


def test_an_unknown_name_is_named(metrics):
    with pytest.raises(ValueError, match="no training photograph is named 汉堡"):
        metrics.accuracy(coloured_images(NAMES[:1]), ["汉堡"])
