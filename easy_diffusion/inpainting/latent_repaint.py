"""RePaint in the latent space of an autoencoder.

The image x is encoded, RePaint (repaint.py) inpaints the latent, and the decoded result is blended
into the image. With the encoder E, the decoder D, the mask m (1 = inpaint) and f×f pixels per
latent:

    z0     = E(fill(x))                         masked pixels filled from their neighbours
    m_z    = max of m over each f×f square      a latent is inpainted if any of its pixels is
    z      = RePaint(z0, m_z)
    result = blend(D(z), x, m)                  pixels outside the mask stay unchanged

Without the filling, colours under the mask would enter the latents of the pixels beside it.
Avrahami et al., "Blended Latent Diffusion", 2023, apply a mask to the latents of every step in the
same way.

The file needs torch and numpy, repaint.py and blending.py beside it, and diffusion/, networks/,
latent_space.py and images.py.

>>> from ..diffusion.prediction import Prediction
>>> from ..diffusion.schedule import NoiseSchedule
>>> def denoise(z_t, t):                                # stands for a trained network
...     return Prediction(x0=torch.zeros_like(z_t), eps=z_t)
>>> autoencoder = Autoencoder((32, 32))
>>> inpaint = make_latent_inpainter(denoise, NoiseSchedule.cosine(100), autoencoder, steps=5)
>>> image = np.full((16, 16, 3), 200, np.uint8)
>>> mask = np.zeros((16, 16), bool)
>>> mask[:, 8:] = True
>>> result = inpaint(image, mask)
>>> result.shape, bool((result[~mask] == 200).all())
((16, 16, 3), True)
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..latent_space import decode, make_encoder
from ..networks.autoencoder import Autoencoder
from .blending import blend, check_mask, fill_from_neighbours, pad_to_multiple, to_pixel_values
from .repaint import repaint_sampling


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Reduce a mask bool [B, 1, H, W] to latents: bool [B, 1, H/f, W/f], f = factor.

    A latent is True if any of its f×f pixels is.
    """
    return F.max_pool2d(mask.float(), factor) > 0


def make_latent_inpainter(
    denoise,
    schedule,
    autoencoder: Autoencoder,
    steps: int = 25,
    jump: int = 5,
    resamples: int = 4,
    generator=None,
    size_multiple: int = 1,
    progress: Callable = iter,
) -> Callable:
    """Make an inpainter (image uint8 [H, W, 3], mask bool [H, W]) → image that works on latents.

    denoise: (z_t, t) → Prediction of latents, such as `diffusion.denoiser(network, context)`.
    schedule: the NoiseSchedule of the network.
    steps, jump, resamples: see `repaint_levels` in repaint.py.
    generator: torch.Generator of the noise.
    size_multiple: height and width of the latents are padded to multiples of this.
    progress: wraps the sampling loop's Steps, for example tqdm.

    It runs where the autoencoder is. Pixels outside the mask are returned unchanged. The inpainter
    raises ValueError for a mask of the wrong shape or dtype.
    """
    encode = make_encoder(autoencoder)
    device = next(autoencoder.parameters()).device

    def inpaint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not check_mask(image, mask).any():
            return image.copy()
        height, width = mask.shape

        # Encode the image, with the mask filled in.
        multiple = autoencoder.factor * size_multiple
        padded_image, padded_mask = pad_to_multiple(image, mask, multiple)
        filled = fill_from_neighbours(padded_image, padded_mask)
        filled = torch.from_numpy(filled).permute(2, 0, 1)[None]            # [1, 3, H, W]
        z0, _ = encode(filled)                                              # [1, Z, h, w]
        pixel_mask = torch.from_numpy(padded_mask)[None, None]              # [1, 1, H, W]
        z_mask = latent_mask(pixel_mask, autoencoder.factor).to(device)     # [1, 1, h, w]

        # Inpaint the latent, decode it, and remove the padding.
        sampling = repaint_sampling(
            denoise, schedule, z0, z_mask, steps, jump, resamples, generator
        )
        *_, last = progress(sampling)
        decoded = to_pixel_values(decode(autoencoder, last.x))              # [H, W, 3]
        return blend(decoded[:height, :width], image, mask)

    return inpaint
