"""Prompt-to-Prompt: change a caption, and keep the layout by keeping the attention.

Two images are sampled side by side from the same noise, one with the source caption and one with
the target caption. During the first steps, which decide the layout, the second image uses the
attention weights M of the first one:

    cross-attention   M*[:, j] ← M[:, i]    for token j of the target that belongs to token i of the
                                            source
                      M*[:, j] ← c M*[:, j] for a token with the factor c (reweighting)
    self-attention    M* ← M

(Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022, section 3.2.)
Tokens are characters here, so that `difflib` says which of them belong together.

The file needs torch and the folders diffusion/ and networks/.

>>> align_characters("番茄炒鸡蛋", "番茄炒豆腐", replace=False)
[0, 1, 2, 3, -1, -1]
>>> align_characters("番茄炒鸡蛋", "番茄炒豆腐", replace=True)
[0, 1, 2, 3, 4, 5]
"""

from collections.abc import Callable
from difflib import SequenceMatcher

import torch

from ..diffusion.prediction import Prediction
from ..networks.attention_maps import attention_edited


def align_characters(source: str, target: str, replace: bool) -> list[int]:
    """For each token of the target caption, the token of the source that it belongs to, or -1.

    Token 0 is the start token, token i + 1 is character i.

    replace: whether characters that take the place of as many others belong to those.
    """
    tokens = [0] + [-1] * len(target)
    matcher = SequenceMatcher(None, source, target, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and replace and i2 - i1 == j2 - j1):
            tokens[j1 + 1:j2 + 1] = range(i1 + 1, i2 + 1)
    return tokens


def prompt_to_prompt(
    network,
    diffusion,
    encoder,
    source: str,
    target: str,
    cross: float = 0.8,
    self_attention: float = 0.4,
    replace: bool = True,
    factors: dict[str, float] | None = None,
) -> Callable:
    """A denoiser for x_t [2, C, H, W]: the source image, and the target image with its layout.

    Both begin with the same noise: ddim(denoise, schedule, x_T=noise.expand(2, -1, -1, -1)).
    With guidance it is the conditional denoiser.

    network: a UNet, not a FastUNet.
    cross, self_attention: fractions of the timesteps, from the noisiest on, at which the weights of
        the cross-attention and of the self-attention are kept.
    replace: see `align_characters`.
    factors: character → factor of its weights in the target image, at all timesteps.

    Raises ValueError for a factor of a character that the target caption does not have.
    """
    factors = factors or {}
    missing = "、".join(sorted(set(factors) - set(target)))
    if missing:
        raise ValueError(f"the caption {target!r} has no {missing}")
    with torch.no_grad():
        context, mask = encoder([source, target])
    denoise = diffusion.denoiser(network, context, mask)
    tokens = align_characters(source, target, replace)
    aligned = [(j, i) for j, i in enumerate(tokens) if i >= 0]
    scale = torch.ones(context.shape[1], device=context.device)                 # [L]
    for j, character in enumerate(target, 1):
        scale[j] = factors.get(character, 1.0)

    def denoise_both(x_t, t) -> Prediction:
        noise_level = (int(t.max()) + 1) / len(diffusion)           # 1 at the noisiest timestep
        keeps_cross = noise_level > 1 - cross
        keeps_self = noise_level > 1 - self_attention

        def edit(weights, layer, is_cross):
            if not is_cross:
                return weights[:1].expand_as(weights) if keeps_self else weights
            if not keeps_cross and not factors:
                return weights
            edited = weights.clone()
            if keeps_cross:
                for j, i in aligned:
                    edited[1, ..., j] = weights[0, ..., i]
            edited[1] = edited[1] * scale
            return edited

        with attention_edited(network, edit):
            return denoise(x_t, t)

    return denoise_both
