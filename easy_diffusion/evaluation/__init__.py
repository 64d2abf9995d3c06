"""Evaluation: do samples show what their prompts say, and do they look like real images?

The files, in reading order:

    attribute_classifier.py   a classifier of the ingredients and the way of cooking in an image of
                              a dish; prompt accuracy, the fraction of samples that are as asked
    metrics.py                Fréchet and kernel distance between samples and real images; PSNR,
                              SSIM and sharpness of reconstructions

The folder needs no other folder of this package, only torch.
"""

from .attribute_classifier import (
    AttributeClassifier,
    augment,
    classifier_features,
    prompt_accuracy,
    train_attribute_classifier,
)
from .metrics import frechet_distance, kernel_distance, psnr, sharpness, ssim

__all__ = [
    "AttributeClassifier",
    "augment",
    "classifier_features",
    "frechet_distance",
    "kernel_distance",
    "prompt_accuracy",
    "psnr",
    "sharpness",
    "ssim",
    "train_attribute_classifier",
]
