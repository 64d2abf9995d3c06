"""TODO."""

import numpy as np
import torch
import torch.nn.functional as F


def check_mask(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask bool [H, W], if it is one for this picture uint8 [H, W, 3]; else ValueError."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    if mask.dtype != np.bool_ or mask.shape != picture.shape[:2]:
        raise ValueError(f"for a picture {list(picture.shape)} a mask is bool {list(picture.shape[:2])}, True = repaint; not {mask.dtype} "
                         f"{list(mask.shape)}")
    return mask


def fill_from_neighbours(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, C] whose masked pixels have grown in from their known neighbours, ring by ring; all grey if none is known."""
    values, unknown = np.where(mask[..., None], 127, picture).astype(np.float32), mask.copy()
    while unknown.any() and not unknown.all():
        known = np.pad((~unknown).astype(np.float32), 1)                    # [H + 2, W + 2]
        colours = np.pad(values * (~unknown)[..., None], ((1, 1), (1, 1), (0, 0)))
        shifts = [(slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])) for y in range(3) for x in range(3)]
        count, total = sum(known[s] for s in shifts), sum(colours[s] for s in shifts)
        grown = unknown & (count > 0)
        values[grown] = total[grown] / count[grown][:, None]
        unknown &= ~grown
    return values.round().astype(np.uint8)


def pad_to_multiple(picture: np.ndarray, mask: np.ndarray, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture and mask with columns on the right and rows below, to be repainted, until their sides are multiples of this."""
    more = [(0, -side % multiple) for side in mask.shape]
    return np.pad(picture, [*more, (0, 0)], mode="edge"), np.pad(mask, more, constant_values=True)


def to_pixel_values(x: torch.Tensor) -> np.ndarray:
    """A picture [1, 3, H, W] in [-1, 1] → floats [H, W, 3] in 0 … 255, not rounded."""
    return (x[0].float().clamp(-1, 1).permute(1, 2, 0).cpu().numpy() + 1) * 127.5


def blend(painted: np.ndarray, picture: np.ndarray, mask: np.ndarray, width: int = 8) -> np.ndarray:
    """A picture [H, W, 3] in 0 … 255 that was painted whole, set into the mask of another, uint8, without a seam; outside the mask that one
    stays to the byte.

    A decoder does not give back what it was given: it shifts colours a little, or flattens them, and that adds up from repaint to repaint.
    What it did is seen beside the mask, on the known pixels near it: there the picture is gain · painted + shift + rest. Gain (at least 1,
    at most 1.1; for each colour, the slope of the best straight line) and shift are made good everywhere, the rest, as its mean near each
    place, up to `width` pixels into the mask, less and less of it.
    """
    check_mask(picture, mask)
    if painted.shape != picture.shape:
        raise ValueError(f"what was painted is of the picture's shape {list(picture.shape)}, not {list(painted.shape)}")
    painted = painted.astype(np.float32)
    if mask.all() or not mask.any():
        return painted.clip(0, 255).round().astype(np.uint8) if mask.all() else picture.copy()
    known = torch.from_numpy(~mask).float()[None]                           # [1, H, W]

    def around(x, pixels):                                                  # the mean over the square of so many pixels to each side
        return F.avg_pool2d(x, 2 * pixels + 1, stride=1, padding=pixels, count_include_pad=False)

    near = ((known > 0) & (around(known, 2 * width) < 1))[0].numpy()
    truth, seen = picture[near].astype(np.float64), painted[near].astype(np.float64)                        # [N, 3]
    spread = seen - seen.mean(axis=0)
    gain = ((spread * (truth - truth.mean(axis=0))).sum(axis=0) / (spread ** 2).sum(axis=0).clip(1e-6)).clip(1, 1.1)
    painted = (painted - seen.mean(axis=0)) * gain + truth.mean(axis=0)
    rest = torch.from_numpy(np.where(mask[..., None], 0, picture - painted)).float().permute(2, 0, 1)       # [3, H, W]
    share = around(known, width)                                            # half at a straight rim, 0 farther in than `width`
    local = around(rest, width) / share.clamp(min=1e-6) * (2 * share).clamp(max=1)
    whole = (painted + local.permute(1, 2, 0).numpy()).clip(0, 255).round().astype(np.uint8)
    return np.where(mask[..., None], whole, picture)
