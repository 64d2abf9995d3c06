"""The attribute classifier: what it learns, exact matches, prompt accuracy, features."""

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


def test_an_exact_match_has_all_ingredients_no_others_and_the_way():
    classifier = AttributeClassifier(["番茄", "鸡蛋"], ["炒", "汤"])
    predictions = [
        (frozenset({"番茄", "鸡蛋"}), "炒"),
        (frozenset({"番茄", "鸡蛋"}), "炒"),
        (frozenset({"番茄"}), "炒"),
        (frozenset({"番茄", "鸡蛋"}), "汤"),
    ]
    classifier.classify = lambda images: predictions
    dishes = [
        (("鸡蛋", "番茄"), "炒"),
        (("番茄",), "炒"),
        (("番茄", "鸡蛋"), "炒"),
        (("番茄", "鸡蛋"), "炒"),
    ]
    matches = classifier.exact_matches(torch.zeros(4), dishes)
    assert matches == [True, False, False, False]
    assert prompt_accuracy(matches) == 0.25
    with pytest.raises(ValueError, match="4 images, but 1"):
        classifier.exact_matches(torch.zeros(4), dishes[:1])


def test_it_learns_to_classify():
    """Five ingredients and three ways in 120 steps; a guess would match once in 45 times."""
    torch.manual_seed(0)
    ingredients = {"番茄", "生菜", "木耳", "豆腐", "胡萝卜"}
    ways = ("炒", "砂锅", "面")
    dataset = [
        (image, name) for image, name in Dishes(6000, 32)
        if set(attributes(name).ingredients) <= ingredients and attributes(name).way in ways
    ]
    train_set = dataset[:-40]
    test_set = dataset[-40:]
    classifier = AttributeClassifier(INGREDIENTS, WAYS, width=16)
    loader = torch.utils.data.DataLoader(train_set, 32, shuffle=True)
    losses = list(
        train_attribute_classifier(classifier, loader, attributes, steps=120, learning_rate=4e-3)
    )
    assert len(losses) == 120
    assert losses[-1] < losses[0] / 4
    images = torch.stack([image for image, _ in test_set])
    matches = classifier.exact_matches(images, [attributes(name) for _, name in test_set])
    assert prompt_accuracy(matches) > 0.5


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        prompt_accuracy([])
    with pytest.raises(ValueError, match="no batch"):
        next(train_attribute_classifier(AttributeClassifier(["番茄"], ["炒"]), [], attributes))


def test_augmented_images_stay_recognisable_and_half_of_them_are_blurred():
    images = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    augmented = augment(images)
    assert augmented.shape == images.shape
    assert 0.1 < (augmented - 128).abs().mean() < 10
    stripes = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 255
    contrast = augment(stripes).std(dim=(1, 2, 3))
    assert 0.2 < (contrast < 80).float().mean() < 0.8           # blur removes the stripes


def test_features_are_one_float64_vector_per_image():
    classifier = AttributeClassifier(["番茄"], ["炒", "汤"], width=8)
    images = torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8)
    features = classifier_features(classifier, images)
    assert features.shape == (7, 128)
    assert features.dtype == torch.float64
