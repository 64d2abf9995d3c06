"""Blending: place an inpainted region into an image without a seam.

A model that inpaints an image x returns a whole image y. Outside the mask, y differs a little from
x, because an autoencoder's decoder shifts or flattens colours. The same errors inside the mask add
up when an animation inpaints one region after another. They are measured on the known pixels near
the mask, and corrected inside it:

    corrected = gain · (y - mean(y)) + mean(x)      gain = cov(x, y) / var(y), limited to 1 … 1.1
    result    = corrected + w · box(x - corrected)  inside the mask
    result    = x                                   outside the mask

The first line is a linear colour transfer, similar to Reinhard et al., "Color Transfer between
Images", 2001; mean, cov and var are those of each colour channel over the known pixels near the
mask. In the second line, box(·) is the mean over the known pixels in a square around a pixel. The
weight w is 1 at the edge of the mask and falls to 0 inside it.

The file also has what every inpainter needs before it calls its model: `check_mask`,
`fill_from_neighbours` and `pad_to_multiple`. It needs torch and numpy.

>>> image = np.full((20, 20, 3), 100, np.uint8)
>>> mask = np.zeros((20, 20), bool)
>>> mask[:, 10:] = True
>>> inpainted = np.full((20, 20, 3), 97.0)              # the decoder is 3 levels too dark
>>> result = blend(inpainted, image, mask)
>>> int(result.min()), int(result.max())
(100, 100)
"""

import numpy as np
import torch
import torch.nn.functional as F


def check_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mask if it is bool [H, W] for an image uint8 [H, W, 3]; else raise ValueError."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if mask.dtype != np.bool_ or mask.shape != image.shape[:2]:
        raise ValueError(
            f"for an image {list(image.shape)} the mask must be bool {list(image.shape[:2])}, "
            f"True = inpaint; not {mask.dtype} {list(mask.shape)}"
        )
    return mask


def fill_from_neighbours(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill the masked pixels of an image uint8 [H, W, C] with colours from the known pixels.

    In each round, masked pixels next to known ones become the mean of their known neighbours (of
    8), and count as known from then on. If no pixel is known, all become grey, 127.
    """
    h, w = mask.shape
    values = np.where(mask[..., None], 127, image).astype(np.float32)       # [H, W, C]
    unknown = mask.copy()
    shifts = [(slice(y, y + h), slice(x, x + w)) for y in range(3) for x in range(3)]
    while unknown.any() and not unknown.all():
        known = (~unknown).astype(np.float32)
        padded_known = np.pad(known, 1)                                     # [H + 2, W + 2]
        padded_values = np.pad(values * (~unknown)[..., None], ((1, 1), (1, 1), (0, 0)))
        count = sum(padded_known[shift] for shift in shifts)                # [H, W]
        total = sum(padded_values[shift] for shift in shifts)               # [H, W, C]
        fillable = unknown & (count > 0)
        values[fillable] = total[fillable] / count[fillable][:, None]
        unknown &= ~fillable
    return values.round().astype(np.uint8)


def pad_to_multiple(
    image: np.ndarray, mask: np.ndarray, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pad image and mask on the right and below until height and width are multiples of `multiple`.

    The added pixels repeat the edge of the image, and are True in the mask.
    """
    padding = [(0, -side % multiple) for side in mask.shape]
    padded_image = np.pad(image, [*padding, (0, 0)], mode="edge")
    padded_mask = np.pad(mask, padding, constant_values=True)
    return padded_image, padded_mask


def from_pixel_values(image: np.ndarray) -> torch.Tensor:
    """Convert an image uint8 [H, W, 3] to float32 [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pixel_values(x: torch.Tensor) -> np.ndarray:
    """Convert one image [1, 3, H, W] in [-1, 1] to float32 [H, W, 3] in 0 … 255, not rounded."""
    x = x[0].float().clamp(-1, 1)
    return (x.permute(1, 2, 0).cpu().numpy() + 1) * 127.5


def blend(
    inpainted: np.ndarray, image: np.ndarray, mask: np.ndarray, width: int = 8
) -> np.ndarray:
    """Place the masked region of `inpainted` into `image`, with corrected colours and no seam.

    inpainted: float or uint8 [H, W, 3] in 0 … 255, the model's output for the whole image.
    image: uint8 [H, W, 3]; its pixels outside the mask are returned unchanged.
    mask: bool [H, W], True = take the pixel from `inpainted`.
    width: how far the correction at the edge of the mask extends into it, in pixels.

    Returns uint8 [H, W, 3]. Raises ValueError if the shapes do not fit.
    """
    check_mask(image, mask)
    if inpainted.shape != image.shape:
        raise ValueError(
            f"inpainted must have the image's shape {list(image.shape)}, "
            f"not {list(inpainted.shape)}"
        )
    inpainted = inpainted.astype(np.float32)
    if mask.all():
        return inpainted.clip(0, 255).round().astype(np.uint8)
    if not mask.any():
        return image.copy()

    # Linear colour transfer, fitted to the known pixels near the mask. A gain below 1 would flatten
    # the texture, and a large gain would amplify noise.
    known = torch.from_numpy(~mask).float()[None]                           # [1, H, W]
    near = (known > 0) & (_box_mean(known, 2 * width) < 1)
    near = near[0].numpy()                                                  # [H, W]
    x = image[near].astype(np.float64)                                      # [N, 3]
    y = inpainted[near].astype(np.float64)                                  # [N, 3]
    x_mean = x.mean(axis=0)
    y_mean = y.mean(axis=0)
    covariance = ((y - y_mean) * (x - x_mean)).sum(axis=0)
    variance = ((y - y_mean) ** 2).sum(axis=0)
    gain = (covariance / variance.clip(1e-6)).clip(1, 1.1)                  # [3]
    corrected = (inpainted - y_mean) * gain + x_mean                        # [H, W, 3]

    # The remaining difference at the edge of the mask, faded out over `width` pixels.
    residual = np.where(mask[..., None], 0, image - corrected)
    residual = torch.from_numpy(residual).float().permute(2, 0, 1)          # [3, H, W]
    fraction = _box_mean(known, width)              # of known pixels: 1/2 at a straight edge
    local_mean = _box_mean(residual, width) / fraction.clamp(min=1e-6)
    weight = (2 * fraction).clamp(max=1)
    offset = (local_mean * weight).permute(1, 2, 0).numpy()                 # [H, W, 3]

    result = (corrected + offset).clip(0, 255).round().astype(np.uint8)
    return np.where(mask[..., None], result, image)


def _box_mean(x: torch.Tensor, radius: int) -> torch.Tensor:
    """The mean of x [C, H, W] over the square of 2 · radius + 1 pixels around each pixel."""
    size = 2 * radius + 1
    return F.avg_pool2d(x, size, stride=1, padding=radius, count_include_pad=False)
