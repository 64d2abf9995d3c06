"""Evaluation: do samples show what their prompts say, and do they look like real images?

The files, in reading order:

    attribute_classifier.py   a classifier of the ingredients and the way of cooking in an image of
                              a dish; prompt accuracy, the fraction of samples that are as asked
    photo_classifier.py       a linear probe that names the dish in a photograph, distances between
                              sets of photographs, and a check for copies
    part_segmenter.py         what each pixel of a dish shows: does a sample keep to a layout?
    film_metrics.py           a classifier of motions; how far a plate turns; whether a film loops
    diffusion_classifier.py   which caption explains an image best, asked of a text-to-image model
    metrics.py                Fréchet and kernel distance between samples and real images; PSNR,
                              SSIM and sharpness of reconstructions; how visible a seam is

The folder needs no other folder of this package, only torch and tqdm.
"""

from .attribute_classifier import (
    AttributeClassifier,
    augment,
    classifier_features,
    prompt_accuracy,
    train_attribute_classifier,
)
from .diffusion_classifier import Round, classify
from .film_metrics import (
    MotionClassifier,
    loop_seam_ratio,
    measure_rotation,
    train_motion_classifier,
)
from .metrics import frechet_distance, kernel_distance, psnr, seam, sharpness, ssim
from .part_segmenter import PartSegmenter, mean_iou, train_segmenter
from .photo_classifier import (
    LinearProbe,
    PhotoMetrics,
    compute_features,
    copied_fraction,
    nearest_neighbours,
    top_k_accuracy,
    train_linear_probe,
)

__all__ = [
    "AttributeClassifier",
    "LinearProbe",
    "MotionClassifier",
    "PartSegmenter",
    "PhotoMetrics",
    "Round",
    "augment",
    "classifier_features",
    "classify",
    "compute_features",
    "copied_fraction",
    "frechet_distance",
    "kernel_distance",
    "loop_seam_ratio",
    "mean_iou",
    "measure_rotation",
    "nearest_neighbours",
    "prompt_accuracy",
    "psnr",
    "seam",
    "sharpness",
    "ssim",
    "top_k_accuracy",
    "train_attribute_classifier",
    "train_linear_probe",
    "train_motion_classifier",
    "train_segmenter",
]
