"""The training loop, bare: read this one first. trainer.py has the same step, made robust.

Each step takes a batch x0, draws a timestep t and noise eps for each image, and descends the
gradient of the error of the network's prediction (Ho et al., "Denoising Diffusion Probabilistic
Models", 2020, algorithm 1):

    eps ~ N(0, I),    x_t = alpha_t x0 + sigma_t eps
    theta ← theta - optimizer step along the gradient of |f_theta(x_t, t, context) - target|²

`target` is what the network learns to predict. `GaussianDiffusion.target` returns, by
prediction_type, "eps": eps, "x0": x0, "v": alpha_t eps - sigma_t x0. |…|² is the mean over the
pixels. `diffusion.loss` computes it; another diffusion, such as RectifiedFlow, has an x_t and a
target of its own.

Some captions are dropped: the encoder's unconditional element takes their place, so that the
network also learns the unconditional prediction for guidance (Ho & Salimans, "Classifier-Free
Diffusion Guidance", 2022, algorithm 1). One samples from the averaged weights, the EMA.

The timesteps, dropped captions and noise of step i follow from (seed, i), as in `train`, so both
loops take the same draws. What is missing here:

    moving the models to the GPU, resuming, mixed precision, several processes, micro-batches
    skipping of bad steps
    warm-up and decay of the learning rate, and the phase with SGD
    the loss weights of ImportanceTimesteps: it is never updated, so its draws stay uniform
    seeds of the network's dropout, which uses the global generators

The file needs torch, the folder diffusion/ and, beside it, data_loader.py and ema.py.

>>> from ..diffusion.gaussian import GaussianDiffusion
>>> from ..diffusion.schedule import NoiseSchedule
>>> class Network(torch.nn.Conv2d):
...     def forward(self, x_t, t, context, mask):
...         return super().forward(x_t)
>>> network = Network(3, 3, 1)
>>> diffusion = GaussianDiffusion(NoiseSchedule.cosine(100))
>>> loader = [(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), ["红", "绿", "蓝", "白"])]
>>> optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
>>> [step.index for step in train_simple(network, diffusion, loader, None, optimizer, steps=3)]
[0, 1, 2]
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from ..diffusion.timesteps import uniform_timesteps
from .data_loader import derive_seed, infinite_batches, normalize_pixels, unpack_batch
from .ema import update_ema


class SimpleStep(NamedTuple):
    """One training step: its number from 0, the mean loss of its batch, and the EMA models.

    ema_network, ema_encoder: in eval mode; ema_encoder is None if there is no encoder. The next
        step updates them in place; copy.deepcopy keeps a state.
    """

    index: int
    loss: float
    ema_network: torch.nn.Module
    ema_encoder: torch.nn.Module | None


def train_simple(
    network, diffusion, loader, encoder, optimizer, steps,
    timesteps=uniform_timesteps, caption_dropout=0.1, clip=1.0, ema=0.999, seed=0,
) -> Iterator[SimpleStep]:
    """Train a network, and its encoder unless that is None, in place; yield every step.

    network, encoder: on the device to train on. optimizer: of the parameters of both.
    timesteps: function (batch, T, generator) → t [batch]. ema: limit of the EMA's decay.
    """
    models = torch.nn.ModuleList([network, encoder])        # an encoder of None stays in it
    ema_models = copy.deepcopy(models).requires_grad_(False).eval()
    device = next(network.parameters()).device
    # The CPU draws timesteps and dropped captions; the device draws the noise.
    generator = torch.Generator()
    noise_generator = generator if device.type == "cpu" else torch.Generator(device)
    for index, batch in zip(range(steps), infinite_batches(loader)):
        # The batch: pixels become [-1, 1]; extras are more inputs of the network, by name.
        images, captions, extras = unpack_batch(batch)
        x0 = normalize_pixels(images.to(device)).float()                        # [B, C, H, W]
        extras = {name: normalize_pixels(extra.to(device)) for name, extra in extras.items()}

        # A timestep for each image; some captions are dropped for classifier-free guidance.
        generator.manual_seed(derive_seed(seed, index))
        t = timesteps(len(x0), len(diffusion), generator).to(device)            # [B]
        dropped = torch.rand(len(x0), generator=generator) < caption_dropout

        # The captions become token embeddings.
        models.train()
        context = mask = None
        if encoder is not None:
            uncond = getattr(encoder, "uncond", "")
            captions = [uncond if drop else c for c, drop in zip(captions, dropped.tolist())]
            context, mask = encoder(captions)                                   # [B, L, D], [B, L]

        # The central step. GaussianDiffusion.loss in diffusion/gaussian.py computes, of each image:
        #     eps ~ N(0, I);  x_t = add_noise(x0, t, eps) = alpha_t x0 + sigma_t eps
        #     |network(x_t, t, context, mask) - target(x0, t, eps)|² · loss weight
        with_extras = partial(network, **extras)
        if noise_generator is not generator:
            noise_generator.manual_seed(derive_seed(seed, index, "noise", 0))
        loss = diffusion.loss(with_extras, x0, t, context, mask, noise_generator).mean()

        # The optimizer step along the clipped gradient, and the moving average of the weights.
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), clip)
        optimizer.step()
        update_ema(ema_models, models, index, ema)
        yield SimpleStep(index, loss.item(), *ema_models)
