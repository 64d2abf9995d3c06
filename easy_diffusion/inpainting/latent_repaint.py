"""TODO."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..latent_space import decode, make_encoder
from ..networks.autoencoder import Autoencoder
from .blending import blend, check_mask, fill_from_neighbours, pad_to_multiple, to_pixel_values
from .repaint import repaint_sampling


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """A mask bool [B, 1, H, W] for latents, [B, 1, H/f, W/f]: True where any of the f×f pixels is to be repainted."""
    return F.max_pool2d(mask.float(), factor) > 0


def make_latent_inpainter(denoise, schedule, autoencoder: Autoencoder, steps: int = 25, jump: int = 5, resamples: int = 4, generator=None,
                   size_multiple: int = 1, progress: Callable = iter) -> Callable:
    """A function (picture uint8 [H, W, 3], mask bool [H, W]) → picture that repaints the mask in the autoencoder's space; the rest stays to
    the byte. denoise: of latents; the other arguments as for inpaint.painter, multiple: of the latents' sides.

    Before it is encoded, what is to be repainted is filled from its known neighbours; else its colour would leak into latents beside it.
    """
    encode, device = make_encoder(autoencoder), next(autoencoder.parameters()).device

    def paint(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(picture, mask).any():
            return picture.copy()
        wider, hidden = pad_to_multiple(picture, mask, autoencoder.factor * size_multiple)
        known = torch.from_numpy(fill_from_neighbours(wider, hidden)).permute(2, 0, 1)[None]                              # [1, 3, H, W]
        where = latent_mask(torch.from_numpy(hidden)[None, None], autoencoder.factor).to(device)            # [1, 1, h, w]
        *_, last = progress(repaint_sampling(denoise, schedule, encode(known)[0], where, steps, jump, resamples, generator))
        return blend(to_pixel_values(decode(autoencoder, last.x))[:len(mask), :mask.shape[1]], picture, mask)

    return paint
