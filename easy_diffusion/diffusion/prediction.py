"""TODO."""

from typing import NamedTuple

import torch


class Prediction(NamedTuple):
    """What a denoiser says about x_t [B, C, H, W]: the picture and the noise in it, both [B, C, H, W], and the
    logarithm of the variance of the step to t - 1, [B, 1, 1, 1] or, where it is learned, [B, C, H, W] (None: the lower bound,
    DDPM's fixed_small)."""

    x0: torch.Tensor
    eps: torch.Tensor
    log_variance: torch.Tensor | None = None


class Denoiser:
    """(x_t [B, C, H, W], t [B]) -> Prediction: a network, what its output means, and words that stay the same over all steps.

    prediction: (output, x_t, t) -> Prediction. context [B, L, D] and mask bool [B, L]; those of one caption serve any B. The network is
    told time_scale · t. A network with a method `cache_context(context, mask)`, as UNet has, prepares the words once for all steps.
    """

    def __init__(self, network, prediction, context=None, mask=None, time_scale: int = 1):
        self.network, self.to_prediction, self.context, self.mask, self.time_scale = network, prediction, context, mask, time_scale
        self.caches_context = context is not None and hasattr(network, "cache_context")
        self.words = network.cache_context(context, mask) if self.caches_context else (context, mask)

    def __call__(self, x_t, t):
        check_batch(self.context, len(x_t))
        words = [w.expand(len(x_t), *w.shape[1:]) if isinstance(w, torch.Tensor) and len(w) == 1 else w for w in self.words]
        return self.to_prediction(self.network(x_t, self.time_scale * t, *words), x_t, t)


def check_batch(context, pictures: int) -> None:
    """Raises ValueError unless there is one caption, or one for each picture."""
    if context is not None and len(context) not in (1, pictures):
        raise ValueError(f"{len(context)} captions for {pictures} pictures: there may be one for all, or one for each")


def eps_from_x0(x0, x_t, t, schedule) -> torch.Tensor:
    """The noise that is in x_t if the picture is x0: ε = (x_t - signal x0) / noise_t."""
    signal, amount = schedule.alpha_sigma(t, x_t)
    return (x_t - signal * x0) / amount


def normal_noise(shape, generator=None, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """Standard normal noise, drawn where the generator lives and then moved: one seed, one picture, on any device."""
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def broadcast_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] → [B, 1, 1, ...], ready to meet `like` [B, ...]."""
    return values.view(-1, *(1,) * (like.ndim - 1))
