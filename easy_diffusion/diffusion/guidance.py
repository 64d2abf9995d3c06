"""TODO."""

import torch

from .prediction import Denoiser, Prediction, check_batch, eps_from_x0


def guided(denoise, denoise_uncond, scale: float, interval: tuple[float, float] | None = None, rescale: float = 0.0, schedule=None):
    """Classifier-free guidance: ε = ε_nothing + scale (ε_text - ε_nothing); scale = 1 is no guidance.

    (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6, with scale = 1 + w.) x0 and ε are linear in each
    other at the same x_t, so both are mixed alike. The variance is the text's.
    interval: guide only at timesteps from interval[0] to interval[1]; elsewhere the text alone is asked, which is half of the
    work (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024). rescale: how far, from 0 to 1, x0's contrast is
    brought back to what it is without guidance, against garish colours (Lin et al. 2023, eq. 15 and 16); needs the schedule.
    """
    if rescale and schedule is None:
        raise ValueError(f"rescale={rescale} needs the schedule, to bring the noise in line with the picture")

    ask_both = batched_guidance(denoise, denoise_uncond)

    def denoise_guided(x_t, t):
        if scale == 1 or (interval is not None and (t.min() < interval[0] or t.max() > interval[1])):
            return denoise(x_t, t)
        text, nothing = ask_both(x_t, t)
        x0, noise = (torch.lerp(a, b, scale) for a, b in ((nothing.x0, text.x0), (nothing.eps, text.eps)))
        if rescale:
            dims = tuple(range(1, x0.ndim))
            contrast = text.x0.std(dim=dims, keepdim=True) / x0.std(dim=dims, keepdim=True)
            x0 = rescale * contrast * x0 + (1 - rescale) * x0
            noise = eps_from_x0(x0, x_t, t, schedule)
        return Prediction(x0, noise, text.log_variance)

    return denoise_guided


def clipped(denoise, schedule):
    """The picture kept within [-1, 1], the noise made to agree with it: ε = (x_t - signal x0) / noise_t."""
    def denoise_clipped(x_t, t):
        prediction = denoise(x_t, t)
        x0 = prediction.x0.clamp(-1, 1)
        return Prediction(x0, eps_from_x0(x0, x_t, t, schedule), prediction.log_variance)

    return denoise_clipped


def batched_guidance(one, other):
    """(x_t, t) -> the Predictions of two denoisers. One that differs from the other by its words alone is asked in the same call, which
    computes once what comes before the first look at the words."""
    same = isinstance(one, Denoiser) and isinstance(other, Denoiser) and one.caches_context and other.caches_context and (
        (one.network, one.to_prediction, one.time_scale) == (other.network, other.to_prediction, other.time_scale))
    if not same:
        return lambda x_t, t: (one(x_t, t), other(x_t, t))
    words = {}

    def ask_both(x_t, t):
        b = len(x_t)
        if b not in words:
            words[b] = one.network.cache_context(*concat_contexts(one.context, one.mask, other.context, other.mask, b))
        output = one.network(x_t, one.time_scale * t, *words[b])                 # [2 B, C, H, W]
        both = one.to_prediction(output, torch.cat([x_t, x_t]), torch.cat([t, t]))
        return [Prediction(*(y if y is None else y[half] for y in both)) for half in (slice(b), slice(b, None))]

    return ask_both


def concat_contexts(context1, mask1, context2, mask2, batch: int):
    """Two contexts, each [batch or 1, L_i, D], as one [2 batch, max L_i, D], and the mask that belongs to it."""
    longest, rows = max(context1.shape[1], context2.shape[1]), []
    for context, mask in ((context1, mask1), (context2, mask2)):
        check_batch(context, batch)
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        missing = longest - context.shape[1]
        rows.append((torch.nn.functional.pad(context, (0, 0, 0, missing)).expand(batch, -1, -1),
                     torch.nn.functional.pad(mask, (0, missing)).expand(batch, -1)))
    context, mask = (torch.cat(parts) for parts in zip(*rows))
    return context, None if mask.all() else mask
