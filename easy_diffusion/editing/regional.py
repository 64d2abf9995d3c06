"""Several captions, each with its region of the image.

At each step the predictions of all captions are averaged with their masks:

    eps = sum_k w_k eps_k,    w_k = m_k / sum_j m_j

(Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", 2023,
eq. 5, with windows of the size of the image.) Each prediction sees the whole noisy image, so that
the regions agree on what they have in common, such as a plate.

The file needs torch and the folder diffusion/.

>>> left = lambda x_t, t: Prediction(x0=torch.zeros_like(x_t), eps=x_t)
>>> right = lambda x_t, t: Prediction(x0=torch.ones_like(x_t), eps=x_t)
>>> masks = torch.zeros(2, 1, 4, 4)
>>> masks[0, ..., :2] = masks[1, ..., 2:] = 1
>>> regional([left, right], masks)(torch.zeros(1, 3, 4, 4), None).x0[0, 0, 0].tolist()
[0.0, 0.0, 1.0, 1.0]
"""

from collections.abc import Callable, Sequence

import torch

from ..diffusion.prediction import Prediction


def regional(denoisers: Sequence[Callable], masks: torch.Tensor) -> Callable:
    """A denoiser that follows each of K denoisers in its region.

    denoisers: K functions (x_t [B, C, H, W], t) → Prediction, such as guided ones.
    masks: [K, 1, H, W], 0 or above; where regions overlap, they are averaged.

    Raises ValueError for another number of masks, for negative values, and for a position in no
    region; the denoiser for masks of another size than x_t.
    """
    if len(masks) != len(denoisers):
        raise ValueError(f"{len(masks)} masks do not fit {len(denoisers)} denoisers")
    total = masks.sum(dim=0)                                        # [1, H, W]
    if masks.min() < 0 or total.min() <= 0:
        raise ValueError(
            "masks must be 0 or above, and each position must be in a region: "
            f"the smallest value is {masks.min():g}, the smallest sum {total.min():g}"
        )
    weights = (masks / total).unbind(0)                             # K of [1, H, W]

    def denoise(x_t, t):
        if masks.shape[2:] != x_t.shape[2:]:
            raise ValueError(
                f"masks of {tuple(masks.shape[2:])} do not fit x_t of {tuple(x_t.shape[2:])}"
            )
        predictions = [denoise_region(x_t, t) for denoise_region in denoisers]
        pairs = [(weight.to(x_t.device), each) for weight, each in zip(weights, predictions)]
        x0 = sum(weight * each.x0 for weight, each in pairs)
        eps = sum(weight * each.eps for weight, each in pairs)
        log_variance = None
        if all(each.log_variance is not None for each in predictions):
            log_variance = sum(weight * each.log_variance for weight, each in pairs)
        return Prediction(x0, eps, log_variance)

    return denoise
