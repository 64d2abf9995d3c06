"""Attend-and-Excite: move x_t until each named ingredient is attended to.

A sample sometimes forgets one of two ingredients: no position attends to its characters. Before a
step, x_t is moved against the gradient of

    loss = max over the phrases of (1 - A_phrase),    A_phrase = the largest attention of a position
    x_t' = x_t - step_size · ∂loss/∂x_t

where the attention is the mean over the heads of the coarsest layers, and over the characters of
the phrase (Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image
Diffusion Models", 2023, eq. 2; without their smoothing, their softmax without the start token, and
their thresholds). The step goes on from x_t'.

The file needs torch, the folders diffusion/ and networks/ and, beside it, prompt_to_prompt.py.

>>> from ..networks.blocks import SpatialTransformer
>>> network = SpatialTransformer(64, context_dim=16)
>>> x, context = torch.randn(2, 64, 8, 8), torch.randn(2, 6, 16)
>>> attention = measure_attention(network, lambda: network(x, context), [[1, 2], [4, 5]])
>>> tuple(attention.shape)                      # phrases, images
(2, 2)
"""

from collections.abc import Callable, Sequence

import torch

from ..diffusion.prediction import Prediction
from ..networks.attention_maps import attention_edited
from .prompt_to_prompt import find_tokens


def attend_and_excite(
    denoise,
    network,
    diffusion,
    encoder,
    caption: str,
    phrases: Sequence[str],
    step_size: float = 20.0,
    iterations: int = 1,
    fraction: float = 0.5,
) -> Callable:
    """A denoiser (x_t [B, C, H, W], t) → Prediction at the moved x_t', for `ddim` or `dpm_solver`.

    These samplers go on from x0 and eps, so that the next step starts from x_t'.

    denoise: the whole denoiser of the caption, with its guidance and clipping.
    network: a UNet, not a FastUNet; diffusion and encoder: those of the denoiser.
    phrases: parts of the caption, such as the names of its ingredients.
    step_size: factor of the gradient by which x_t is moved.
    iterations: gradient steps at each timestep.
    fraction: of the timesteps, from the noisiest on, at which x_t is moved; then the layout is
        decided.

    Raises ValueError for no phrase, and for one that is not in the caption.
    """
    if not phrases:
        raise ValueError("give one phrase of the caption, or more")
    with torch.no_grad():
        context, mask = encoder([caption])
    conditional = diffusion.denoiser(network, context, mask)
    tokens = find_tokens(caption, phrases)

    def denoise_excited(x_t, t) -> Prediction:
        noise_level = (int(t.max()) + 1) / len(diffusion)           # 1 at the noisiest timestep
        if noise_level > 1 - fraction:
            for _ in range(iterations):
                x_t = x_t - step_size * attention_gradient(network, conditional, x_t, t, tokens)
        return denoise(x_t, t)

    return denoise_excited


def attention_gradient(network, denoise, x_t, t, tokens: list[list[int]]) -> torch.Tensor:
    """The gradient of the loss with respect to x_t [B, C, H, W], see the module's docstring.

    denoise: of the network, with the caption. tokens: of each phrase, see `find_tokens`.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        maps = []
        # The gradient is computed inside of the block: with checkpointing it calls the network.
        with attention_edited(network, make_recorder(maps)):
            denoise(x_t, t)
            attention = largest_attention(maps, tokens)             # [P, B]
            loss = (1 - attention).amax(dim=0).sum()    # largest of the phrases, all images
            gradient, = torch.autograd.grad(loss, x_t)
    return gradient


def measure_attention(network, evaluate: Callable, tokens: list[list[int]]) -> torch.Tensor:
    """The largest attention of a position to each of P phrases, in the coarsest layers: [P, B].

    evaluate: () → anything; it calls the network once.
    tokens: of each phrase, see `find_tokens`; the attention to a phrase is the mean over them.
    """
    maps = []
    with attention_edited(network, make_recorder(maps)):
        evaluate()
    return largest_attention(maps, tokens)


def make_recorder(maps: list[torch.Tensor]) -> Callable:
    """An edit that changes no weights, and appends the mean over the heads, [B, N, L], to maps."""
    def record(weights, layer, is_cross):
        if is_cross:
            maps.append(weights.mean(dim=1))
        return weights

    return record


def largest_attention(maps: list[torch.Tensor], tokens: list[list[int]]) -> torch.Tensor:
    """`measure_attention`, from the recorded maps."""
    coarsest = min(each.shape[1] for each in maps)
    attention = torch.stack([each for each in maps if each.shape[1] == coarsest]).mean(dim=0)
    return torch.stack([attention[..., phrase].mean(dim=2).amax(dim=1) for phrase in tokens])
