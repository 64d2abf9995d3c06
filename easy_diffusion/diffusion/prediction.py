"""What a denoiser returns, and how a network becomes a denoiser.

A denoiser is any function

    (x_t [B, C, H, W], t [B]) -> Prediction(x0, eps, log_variance)

It predicts both unknowns of x_t = alpha_t x0 + sigma_t eps. Each follows from the other:

    eps = (x_t - alpha_t x0) / sigma_t
    x0  = (x_t - sigma_t eps) / alpha_t

(Ho et al., "Denoising Diffusion Probabilistic Models", 2020, eq. 4, solved for eps and for x0.)

The x0 and eps of a Prediction must agree in this sense, since samplers use both. A denoiser that
computes or changes x0 computes its eps with `eps_from_x0`.

Many networks predict a mixture of the two (Salimans & Ho, "Progressive Distillation for Fast
Sampling of Diffusion Models", 2022):

    v = alpha_t eps - sigma_t x0

Since alpha_t² + sigma_t² = 1, both follow from v:

    x0  = alpha_t x_t - sigma_t v
    eps = sigma_t x_t + alpha_t v

Samplers and guidance work with denoisers only. They do not need to know what the network was
trained to predict: a function `to_prediction` converts its output. `GaussianDiffusion`
(gaussian.py) and `RectifiedFlow` (flow_matching.py) have such a function, and their method
`denoiser` builds the `Denoiser`.

A network is any function with this contract, for training and sampling alike:

    network(x_t, t, context, mask, **extras) -> output

    x_t       noisy images [B, C, H, W]
    t         [B], int64 timesteps 0 … T - 1; for a flow or an SDE, 1000 · its float times
    context   token embeddings [B, L, D] or [1, L, D]; None for a network without captions
    mask      bool [B, L] or [1, L], True = a real token; None = all tokens are real
    extras    further tensors [B, ...] by name, such as a control image; they are bound before:
              functools.partial(network, control=control) is a network, too
    output    [B, C', H, W], with C' = C, or 2 C if the network also predicts a variance

`check_output` names the shape of an output that breaks it.

The file needs torch only.

>>> alpha_t, sigma_t = 0.6, 0.8
>>> def network(x_t, t, context, mask):
...     return torch.zeros_like(x_t)
>>> def to_prediction(output, x_t, t):                      # the network predicts eps
...     return Prediction(x0=(x_t - sigma_t * output) / alpha_t, eps=output)
>>> denoise = Denoiser(network, to_prediction)
>>> prediction = denoise(torch.ones(2, 3, 8, 8), torch.tensor([500, 500]))
>>> prediction.x0.shape, round(float(prediction.x0[0, 0, 0, 0]), 3)
(torch.Size([2, 3, 8, 8]), 1.667)
"""

from typing import NamedTuple

import torch


class Prediction(NamedTuple):
    """The output of a denoiser for x_t [B, C, H, W].

    x0: the predicted clean image, [B, C, H, W].
    eps: the predicted noise, [B, C, H, W]; it agrees with x0: x_t = alpha_t x0 + sigma_t eps.
    log_variance: the logarithm of the variance of the reverse step from t to t - 1;
        [B, 1, 1, 1], or [B, C, H, W] if the network predicts it.
        None: the posterior variance of q(x_{t-1} | x_t, x0) (variance="fixed_small" in
        gaussian.py).
    """

    x0: torch.Tensor
    eps: torch.Tensor
    log_variance: torch.Tensor | None = None


class Denoiser:
    """A denoiser made of a network, a conversion of its output, and a fixed context.

    network: (x_t, t, context, mask) -> output, see the top of this file.
    to_prediction: (output, x_t, t) -> Prediction.
    context: token embeddings [B, L, D], or [1, L, D] to use one caption for every image.
    mask: bool, [B, L] or [1, L]; True = a real token.
    time_scale: the network receives time_scale · t. It is 1 if t is a timestep, and 1000 if t is
        a time in [0, 1], as in `RectifiedFlow`.

    The context stays the same in all steps of sampling, so its keys and values need to be computed
    only once. If the network has a method `cache_context`, as `FastUNet` (networks/fast_unet.py)
    has, `Denoiser` calls it:

        cache, mask = network.cache_context(context, mask)

    In every step the network then receives this cache and this mask. Such a network must also
    accept the cache of 2 B captions with B images. Its output is then [2 B, C', H, W]: rows i and
    B + i belong to image i, with captions i and B + i. Guidance uses this (guidance.py).
    """

    def __init__(self, network, to_prediction, context=None, mask=None, time_scale: int = 1):
        self.network = network
        self.to_prediction = to_prediction
        self.context = context
        self.mask = mask
        self.time_scale = time_scale
        self.caches_context = context is not None and hasattr(network, "cache_context")
        if self.caches_context:
            self._context_or_cache, self._network_mask = network.cache_context(context, mask)
        else:
            self._context_or_cache = context
            self._network_mask = mask

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        """Evaluate the network on x_t [B, C, H, W] at times t [B]."""
        batch = len(x_t)
        check_batch(self.context, batch)
        context = _expand_to_batch(self._context_or_cache, batch)
        mask = _expand_to_batch(self._network_mask, batch)
        output = self.network(x_t, self.time_scale * t, context, mask)
        return self.to_prediction(output, x_t, t)


def _expand_to_batch(value, batch: int):
    """Expand a tensor [1, ...] to [batch, ...].

    Any other value is returned unchanged: a tensor [batch, ...], a key/value cache, or None.
    """
    if isinstance(value, torch.Tensor) and len(value) == 1:
        return value.expand(batch, *value.shape[1:])
    return value


def check_output(output: torch.Tensor, x_t: torch.Tensor, channels: int) -> None:
    """Raise ValueError, naming both shapes, unless a network's output fits its input.

    For x_t [B, C, H, W] it must have the shape [B, channels, H, W].
    channels: C, or 2 C if the network also predicts a variance.
    """
    expected = (len(x_t), channels, *x_t.shape[2:])
    if tuple(output.shape) != expected:
        raise ValueError(
            f"the network's output must have the shape {expected}, not {tuple(output.shape)}: "
            f"{channels} output channels for an input of shape {tuple(x_t.shape)}"
        )


def check_batch(context, batch: int) -> None:
    """Raise ValueError unless the context has one caption, or one for each image of the batch."""
    if context is not None and len(context) not in (1, batch):
        raise ValueError(
            f"{len(context)} captions for {batch} images: "
            "give one caption for all images or one for each image"
        )


def eps_from_x0(x0, x_t, t, schedule) -> torch.Tensor:
    """The eps that belongs to x0: eps = (x_t - alpha_t x0) / sigma_t.

    x0, x_t: [B, C, H, W].
    t: [B].
    schedule: an object with the method `alpha_sigma(t, x)`: a NoiseSchedule or a RectifiedFlow.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t, x_t)
    return (x_t - alpha_t * x0) / sigma_t


def normal_noise(shape, generator=None, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """Standard normal noise of a shape, on a device.

    generator: a torch.Generator, None for PyTorch's own, or a list of B generators, one for each
        image of shape [B, ...], whose noise then does not depend on the others in the batch.

    It is drawn on the generator's device, in float32 or higher precision, and then moved. With a
    generator on the CPU a seed gives the same noise on every device and in every precision.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators do not fit {shape[0]} images")
        return torch.stack([normal_noise(shape[1:], each, device, dtype) for each in generator])
    source = generator.device if generator is not None else device
    precise = torch.promote_types(dtype, torch.float32)
    noise = torch.randn(shape, generator=generator, device=source, dtype=precise)
    return noise.to(device, dtype)


def broadcast_like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape values [B] to [B, 1, 1, ...], with as many dimensions as x [B, ...]."""
    ones = (1,) * (x.ndim - 1)
    return values.view(-1, *ones)
