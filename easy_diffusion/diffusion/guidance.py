"""Classifier-free guidance and clipping: functions that turn a denoiser into another denoiser.

A denoiser is a function (x_t, t) -> Prediction(x0, eps, log_variance). The functions of this file
take denoisers and return a denoiser, so they compose, and every sampler accepts the result:

    denoise = clipped(guided(denoise_cond, denoise_uncond, scale=4.0), schedule)

Guidance extrapolates from the prediction without a caption to the one with a caption:

    eps = eps_uncond + scale (eps_cond - eps_uncond)
        = scale eps_cond + (1 - scale) eps_uncond

(Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6, with scale = 1 + w.)
The same formula holds for x0 = (x_t - sigma_t eps) / alpha_t: the weights scale and 1 - scale
sum to 1, so that x_t remains as it is, and x0 and eps agree.

A large scale raises the contrast of x0 and oversaturates colours. Rescaling restores the standard
deviation of the conditional prediction, by a fraction phi:

    x0 ← phi x0 std(x0_cond) / std(x0) + (1 - phi) x0

(Lin et al., "Common diffusion noise schedules and sample steps are flawed", 2023, eq. 15 and 16.)
Lin et al. rescale the network's output; here x0 is rescaled, so that it does not depend on the
prediction type. After x0 has been rescaled or clipped, eps follows from it:
eps = (x_t - alpha_t x0) / sigma_t.

The order matters: clipped(guided(…)) limits the result to [-1, 1]; guided(clipped(…), …) limits
what guidance extrapolates from, and the result can leave [-1, 1] again.

The file needs torch and, beside it, prediction.py; its example also schedule.py.

>>> from .schedule import NoiseSchedule
>>> schedule = NoiseSchedule.cosine(1000)
>>> def denoise_cond(x_t, t):                               # with a caption: light grey
...     x0 = torch.full_like(x_t, 0.5)
...     return Prediction(x0, eps_from_x0(x0, x_t, t, schedule))
>>> def denoise_uncond(x_t, t):                             # without: grey
...     x0 = torch.zeros_like(x_t)
...     return Prediction(x0, eps_from_x0(x0, x_t, t, schedule))
>>> denoise = guided(denoise_cond, denoise_uncond, scale=3.0)
>>> x_t, t = torch.zeros(1, 3, 8, 8), torch.tensor([500])
>>> float(denoise(x_t, t).x0[0, 0, 0, 0])                   # 0 + 3 (0.5 - 0)
1.5
"""

import torch

from .prediction import Denoiser, Prediction, check_batch, eps_from_x0


def guided(
    denoise_cond,
    denoise_uncond,
    scale: float,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    schedule=None,
):
    """Classifier-free guidance of a conditional denoiser; returns a denoiser.

    denoise_cond: the conditional denoiser, (x_t, t) -> Prediction.
    denoise_uncond: the unconditional denoiser, for example with the context of the caption "".
    scale: 1 is no guidance; larger values follow the caption more closely.
    interval: (lowest, highest) timestep at which to guide. At other timesteps only the
        conditional denoiser is evaluated, which halves the cost
        (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
    rescale: phi in [0, 1]; 0 is no rescaling, 1 restores the standard deviation of x0 fully.
    schedule: a NoiseSchedule or a RectifiedFlow; needed for rescale only.

    The log_variance of the result is that of the conditional prediction.
    Raises ValueError for a rescale without a schedule.
    """
    if rescale and schedule is None:
        raise ValueError(f"rescale={rescale} needs the schedule, to compute eps from x0")

    denoise_both = batched_guidance(denoise_cond, denoise_uncond)

    def denoise_guided(x_t, t):
        outside = interval is not None and (t.min() < interval[0] or t.max() > interval[1])
        if scale == 1 or outside:
            return denoise_cond(x_t, t)
        # The same as denoise_cond(x_t, t), denoise_uncond(x_t, t)
        cond, uncond = denoise_both(x_t, t)
        eps = uncond.eps + scale * (cond.eps - uncond.eps)
        x0 = uncond.x0 + scale * (cond.x0 - uncond.x0)
        if rescale:
            x0 = _rescale_std(x0, cond.x0, rescale)
            eps = eps_from_x0(x0, x_t, t, schedule)
        return Prediction(x0, eps, cond.log_variance)

    return denoise_guided


def _rescale_std(x0: torch.Tensor, x0_cond: torch.Tensor, phi: float) -> torch.Tensor:
    """Scale each image of x0 [B, C, H, W] towards the standard deviation of x0_cond."""
    dims = tuple(range(1, x0.ndim))
    ratio = x0_cond.std(dim=dims, keepdim=True) / x0.std(dim=dims, keepdim=True)    # [B, 1, 1, 1]
    return phi * ratio * x0 + (1 - phi) * x0


def clipped(denoise, schedule):
    """A denoiser whose x0 is clipped to [-1, 1], with eps computed from the clipped x0.

    schedule: a NoiseSchedule or a RectifiedFlow.

    Use it for images, whose values lie in [-1, 1], and not for latents.
    """
    def denoise_clipped(x_t, t):
        prediction = denoise(x_t, t)
        x0 = prediction.x0.clamp(-1, 1)
        eps = eps_from_x0(x0, x_t, t, schedule)
        return Prediction(x0, eps, prediction.log_variance)

    return denoise_clipped


# ------------------------------------------ an optimisation: one network call for both denoisers


def batched_guidance(denoise_cond, denoise_uncond):
    """A function (x_t, t) -> (conditional Prediction, unconditional Prediction).

    Both come from one network call if the two denoisers are `Denoiser` objects that differ only in
    their context, and their network has the method `cache_context`. The network then receives B
    images with 2 B contexts, see `Denoiser`. `FastUNet` computes the layers before the first
    cross-attention for B images, and the later layers for 2 B.

    Otherwise each denoiser is called.
    """
    if not _share_a_network(denoise_cond, denoise_uncond):
        return lambda x_t, t: (denoise_cond(x_t, t), denoise_uncond(x_t, t))

    network = denoise_cond.network
    cached_contexts = {}                            # batch size: (key/value cache, mask)

    def denoise_both(x_t, t):
        batch = len(x_t)
        if batch not in cached_contexts:
            context, mask = concat_contexts(
                denoise_cond.context, denoise_cond.mask,
                denoise_uncond.context, denoise_uncond.mask, batch,
            )
            cached_contexts[batch] = network.cache_context(context, mask)
        cache, mask = cached_contexts[batch]

        # B images and 2 B contexts in; 2 B outputs out, first the conditional ones.
        output = network(x_t, denoise_cond.time_scale * t, cache, mask)     # [2 B, C, H, W]
        both = denoise_cond.to_prediction(output, torch.cat([x_t, x_t]), torch.cat([t, t]))
        return _select(both, slice(0, batch)), _select(both, slice(batch, None))

    return denoise_both


def _share_a_network(denoise1, denoise2) -> bool:
    """Whether two denoisers differ in their context alone, and their network caches contexts."""
    if not isinstance(denoise1, Denoiser) or not isinstance(denoise2, Denoiser):
        return False
    return (
        denoise1.caches_context
        and denoise2.caches_context
        and denoise1.network == denoise2.network
        and denoise1.to_prediction == denoise2.to_prediction
        and denoise1.time_scale == denoise2.time_scale
    )


def _select(prediction: Prediction, images: slice) -> Prediction:
    """The prediction for some images of the batch."""
    log_variance = prediction.log_variance
    if log_variance is not None:
        log_variance = log_variance[images]
    return Prediction(prediction.x0[images], prediction.eps[images], log_variance)


def concat_contexts(context1, mask1, context2, mask2, batch: int):
    """Concatenate two contexts along the batch; the shorter one is padded and the padding masked.

    context1, context2: [batch or 1, L_i, D].
    mask1, mask2: bool [batch or 1, L_i], True = a real token; None = all tokens are real.

    Returns context [2 batch, L, D] and mask [2 batch, L], L = max(L_1, L_2);
    the mask is None if all tokens are real.
    Raises ValueError unless a context has one caption or one for each image.
    """
    length = max(context1.shape[1], context2.shape[1])
    context1, mask1 = _pad_context(context1, mask1, length, batch)
    context2, mask2 = _pad_context(context2, mask2, length, batch)
    context = torch.cat([context1, context2])                       # [2 batch, L, D]
    mask = torch.cat([mask1, mask2])                                # [2 batch, L]
    if mask.all():
        mask = None
    return context, mask


def _pad_context(context, mask, length: int, batch: int):
    """Pad context and mask to a length, and expand them to the batch size."""
    check_batch(context, batch)
    if mask is None:
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    padding = length - context.shape[1]
    context = torch.nn.functional.pad(context, (0, 0, 0, padding))  # [batch or 1, length, D]
    mask = torch.nn.functional.pad(mask, (0, padding))              # [batch or 1, length]
    return context.expand(batch, -1, -1), mask.expand(batch, -1)
