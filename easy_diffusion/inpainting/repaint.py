"""Repainting a part of a picture with a model that only knows how to paint whole ones: RePaint.

At every step down from t to s, what is known is put back at the right level of noise, and only the rest is the model's:

    x_s = mask · step(x_t) + (1 - mask) · (signal_s x0 + noise_s ε)

Alone, this gives parts that do not fit each other, because the model cannot answer to what was pasted in. So the walk goes
back up, x_u = sqrt(a_u / a_s) x_s + sqrt(1 - a_u / a_s) ε with a = alpha_bar, and down again, several times, and the two
parts grow together (Lugmayr et al., "RePaint", 2022, algorithm 1 and appendix B).

A painter is a function (picture uint8 [H, W, 3], mask bool [H, W], True = repaint) → picture, whose pixels outside the mask are the
picture's own, to the byte. `painter` makes one of a model of pixels, latent.py one of a model of latents, sd_painter.py one of Stable
Diffusion; all of them let `blended` set what they paint into the picture. The file needs torch, numpy and, beside it, samplers.py; its
example also schedule.py.

>>> from .schedule import NoiseSchedule
>>> grey = lambda x_t, t: Prediction(torch.zeros_like(x_t), x_t)
>>> picture, mask = torch.ones(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
>>> mask[..., 4:] = True
>>> *_, last = repaint(grey, NoiseSchedule.cosine(100), picture, mask, steps=10, jump=2, resamples=2)
>>> last.x[0, 0, 0].tolist()
[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..diffusion.prediction import normal_noise
from ..diffusion.samplers import Step, ddpm_step, spaced_timesteps
from .blending import blend, check_mask, pad_to_multiple, to_pixel_values


def repaint_levels(steps: int, jump: int, resamples: int) -> list[int]:
    """The walk of RePaint over noise levels steps - 1 (noisiest) … 0 and -1 (clean), one level at a time.

    Whenever it first reaches one of the levels 0, jump, 2 jump ..., it climbs back `jump` levels, resamples - 1 times
    (where there are `jump` levels above to climb: at steps - jump and higher it does not).
    The first level is steps - 1, the last -1. Raises ValueError unless 1 ≤ jump and 1 ≤ resamples.
    """
    if jump < 1 or resamples < 1:
        raise ValueError(f"jump and resamples are 1 or more, not {jump} and {resamples}")
    climbs = {level: resamples - 1 for level in range(0, steps - jump, jump)}
    level, levels = steps - 1, [steps - 1]
    while level >= 0:
        if climbs.get(level, 0) > 0:
            climbs[level] -= 1
            levels += range(level + 1, level + jump + 1)
            level += jump
        else:
            level -= 1
            levels.append(level)
    return levels


@torch.no_grad()
def repaint_sampling(denoise, schedule, picture: torch.Tensor, mask: torch.Tensor, steps: int = 50, jump: int = 5, resamples: int = 4,
            generator=None) -> Iterator[Step]:
    """Repaint where mask is True; yields a Step for each call of the denoiser, the last one's x is the picture. x0 is what the model takes
    the whole for, also where it is known: at the last step, what it would make of that.

    picture [B, C, H, W] in [-1, 1]; mask bool [B or 1, 1, H, W]. Outside the mask the last x is the picture, exactly.
    steps: noise levels; jump, resamples: see `repaint_levels`. Raises ValueError for a mask of another shape or type.
    """
    fits = mask.ndim == 4 and mask.shape[0] in (1, len(picture)) and mask.shape[1:] == (1, *picture.shape[2:])
    if mask.dtype != torch.bool or not fits:
        raise ValueError(f"for pictures {list(picture.shape)} a mask is bool [{len(picture)} or 1, 1, {picture.shape[2]}, "
                         f"{picture.shape[3]}], not {mask.dtype} {list(mask.shape)}")
    timesteps = spaced_timesteps(len(schedule), steps)[::-1]                # level → t

    def noise():
        return normal_noise(picture.shape, generator, picture.device, picture.dtype)

    x, index = noise(), 0
    levels = repaint_levels(steps, jump, resamples)
    for level, following in zip(levels, levels[1:]):
        t, s = timesteps[level], timesteps[following] if following >= 0 else -1
        a_t, a_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
        if s > t:
            x = math.sqrt(a_s / a_t) * x + math.sqrt(1 - a_s / a_t) * noise()
            continue
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        known = math.sqrt(a_s) * picture + math.sqrt(1 - a_s) * noise() if s >= 0 else picture
        x = torch.where(mask, ddpm_step(schedule, prediction, x, t, s, noise()), known)
        yield Step(index, t, x, prediction.x0)
        index += 1


def make_inpainter(denoise, schedule, steps: int = 25, jump: int = 5, resamples: int = 4, generator=None, device="cpu", size_multiple: int = 1,
            progress: Callable = iter) -> Callable:
    """A function (picture uint8 [H, W, 3], mask bool [H, W]) → picture that repaints the mask; the rest stays to the byte.

    It runs `repaint` on `device`. multiple: of what the sides of the network's pictures are multiples; a picture of other sides gets some
    more columns and rows to be repainted, which are cut off again. watch wraps each walk's steps: tqdm, say, for a progress bar. What it
    returns raises ValueError for a mask of another shape or type.
    """
    def paint(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(picture, mask).any():
            return picture.copy()
        wider, hidden = pad_to_multiple(picture, mask, size_multiple)
        x0 = torch.from_numpy(wider).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1                  # [1, 3, H, W]
        where = torch.from_numpy(hidden)[None, None].to(device)                                             # [1, 1, H, W]
        *_, last = progress(repaint_sampling(denoise, schedule, x0, where, steps, jump, resamples, generator))
        return blend(to_pixel_values(last.x0)[:len(mask), :mask.shape[1]], picture, mask)

    return paint
