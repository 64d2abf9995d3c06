"""Attend-and-Excite: move x_t until each named ingredient is attended to.

A sample sometimes forgets one of two ingredients: no position attends to its characters. Before a
step, x_t is moved against the gradient of

    loss = max over the phrases of (1 - A_phrase),    A_phrase = the largest attention of a position

where the attention is the mean over layers and heads, and over the characters of the phrase (Chefer
et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models",
2023, eq. 2 and algorithm 1; without their smoothing, since a layer here has few positions).

The file needs torch and the folders diffusion/ and networks/.

>>> find_tokens("番茄炒鸡蛋", ["番茄", "鸡蛋"])          # token 0 is the start token
[[1, 2], [4, 5]]
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..diffusion.prediction import Prediction, eps_from_x0
from ..networks.attention_maps import attention_edited


def attend_and_excite(
    network,
    diffusion,
    encoder,
    caption: str,
    phrases: Sequence[str],
    step_size: float = 20.0,
    iterations: int = 1,
    lowest_timestep: int = 500,
) -> Callable:
    """A denoiser (x_t [B, C, H, W], t) → Prediction that attends to all phrases of the caption.

    With guidance it is the conditional denoiser.

    network: a UNet, not a FastUNet.
    phrases: parts of the caption, such as the names of its ingredients.
    step_size: factor of the gradient by which x_t is moved.
    iterations: gradient steps at each timestep.
    lowest_timestep: below it x_t is not moved; the layout is then decided.

    Raises ValueError for a phrase that is not in the caption.
    """
    with torch.no_grad():
        context, mask = encoder([caption])
    denoise = diffusion.denoiser(network, context, mask)
    tokens = find_tokens(caption, phrases)

    def denoise_excited(x_t, t) -> Prediction:
        if int(t.min()) < lowest_timestep:
            return denoise(x_t, t)
        moved = x_t.detach()
        for _ in range(iterations):
            with torch.enable_grad():
                moved.requires_grad_()
                attention = measure_attention(network, partial(denoise, moved, t), tokens)
                loss = (1 - attention).amax(dim=0).sum()    # largest of the phrases, all images
                gradient, = torch.autograd.grad(loss, moved)
            moved = (moved - step_size * gradient).detach()
        x0 = denoise(moved, t).x0
        # The sampler goes on from x_t, so that eps must agree with it.
        return Prediction(x0, eps_from_x0(x0, x_t, t, diffusion.schedule))

    return denoise_excited


def find_tokens(caption: str, phrases: Sequence[str]) -> list[list[int]]:
    """The tokens of each phrase in the caption; the start token is token 0.

    Raises ValueError for a phrase that is not in the caption.
    """
    for phrase in phrases:
        if not phrase or phrase not in caption:
            raise ValueError(f"the caption {caption!r} has no phrase {phrase!r}")
    return [[caption.index(phrase) + 1 + i for i in range(len(phrase))] for phrase in phrases]


def measure_attention(network, evaluate: Callable, tokens: list[list[int]]) -> torch.Tensor:
    """The largest attention of a position to each of P phrases, in the coarsest layers: [P, B].

    evaluate: () → anything; it calls the network once.
    tokens: of each phrase, see `find_tokens`; the attention to a phrase is the mean over them.
    """
    maps = []

    def record(weights, layer, is_cross):
        if is_cross:
            maps.append(weights.mean(dim=1))                        # [B, N, L]
        return weights

    with attention_edited(network, record):
        evaluate()
    coarsest = min(each.shape[1] for each in maps)
    attention = torch.stack([each for each in maps if each.shape[1] == coarsest]).mean(dim=0)
    return torch.stack([attention[..., phrase].mean(dim=2).amax(dim=1) for phrase in tokens])
