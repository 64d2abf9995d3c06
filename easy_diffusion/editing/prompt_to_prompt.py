"""Prompt-to-Prompt: change a caption, and keep the layout by keeping the attention.

Two images are sampled side by side from the same noise, one with the source caption and one with
the target caption. During the first steps, which decide the layout, the second image uses the
attention weights M of the first one:

    cross-attention   M*[:, j] ← M[:, i]    for token j of the target that belongs to token i of the
                                            source
                      M*[:, j] ← c M*[:, j] for a token with the factor c (reweighting)
    self-attention    M* ← M

(Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022, section 3.2; the
self-attention is in their code.) Tokens are characters here, so that which of them belong together
is found by comparing the captions. A network whose `pooled` caption is added to the time embedding
hears of the target on that way, too, which the attention cannot hold back.

The file needs torch and the folders diffusion/ and networks/.

>>> align_characters("番茄炒鸡蛋", "番茄炒西兰花", replace=False)
[0, 1, 2, 3, -1, -1, -1]
>>> align_characters("番茄炒鸡蛋", "番茄炒西兰花", replace=True)
[0, 1, 2, 3, 4, 4, 5]
>>> find_tokens("番茄炒鸡蛋", ["番茄", "鸡蛋"])          # token 0 is the start token
[[1, 2], [4, 5]]
"""

import os
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import torch

from ..diffusion.prediction import Prediction
from ..networks.attention_maps import attention_edited


def align_characters(source: str, target: str, replace: bool) -> list[int]:
    """For each token of the target caption, the token of the source that it belongs to, or -1.

    Token 0 is the start token, token i + 1 is character i.

    replace: True: what is different between a common beginning and a common end takes the place of
        what was there, in proportion if the lengths differ. False: only equal characters belong
        together.
    """
    tokens = [0] + [-1] * len(target)
    if not replace:
        matcher = SequenceMatcher(None, source, target, autojunk=False)
        for i, j, length in matcher.get_matching_blocks():
            tokens[j + 1:j + length + 1] = range(i + 1, i + length + 1)
        return tokens
    start, removed, inserted = find_change(source, target)
    tokens[1:start + 1] = range(1, start + 1)
    for j in range(inserted if removed else 0):
        tokens[start + j + 1] = start + j * removed // inserted + 1
    for j in range(start + inserted, len(target)):
        tokens[j + 1] = j + len(source) - len(target) + 1
    return tokens


def find_change(source: str, target: str) -> tuple[int, int, int]:
    """What differs between a common beginning and a common end: (start, removed, inserted).

    It is source[start:start + removed] and target[start:start + inserted].
    """
    start = len(os.path.commonprefix([source, target]))
    end = len(os.path.commonprefix([source[start:][::-1], target[start:][::-1]]))
    return start, len(source) - start - end, len(target) - start - end


def find_tokens(caption: str, phrases: Sequence[str]) -> list[list[int]]:
    """The tokens of each phrase in the caption; the start token is token 0.

    Raises ValueError for a phrase that is not in the caption.
    """
    for phrase in phrases:
        if not phrase or phrase not in caption:
            raise ValueError(f"the caption {caption!r} has no phrase {phrase!r}")
    return [[caption.index(phrase) + 1 + i for i in range(len(phrase))] for phrase in phrases]


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
    factors: phrase of the target caption → factor of its weights in the target image, at all
        timesteps.

    Raises ValueError for a factor of a phrase that the target caption does not have.
    """
    factors = factors or {}
    phrases = find_tokens(target, list(factors))
    with torch.no_grad():
        context, mask = encoder([source, target])
    denoise = diffusion.denoiser(network, context, mask)
    tokens = align_characters(source, target, replace)
    aligned = [(j, i) for j, i in enumerate(tokens) if i >= 0]
    scale = torch.ones(context.shape[1], device=context.device)                 # [L]
    for phrase, factor in zip(phrases, factors.values()):
        scale[phrase] = factor
    # More characters in the place of fewer ones: each gets less, so that their sum stays.
    proportion = torch.ones(context.shape[1], device=context.device)            # [L]
    start, removed, inserted = find_change(source, target)
    if replace and removed and inserted:
        proportion[start + 1:start + inserted + 1] = removed / inserted

    def denoise_both(x_t, t) -> Prediction:
        noise_level = (int(t.max()) + 1) / len(diffusion)           # 1 at the noisiest timestep
        keeps_cross = noise_level > 1 - cross
        keeps_self = noise_level > 1 - self_attention
        if not keeps_cross and not keeps_self and not factors:
            return denoise(x_t, t)

        def edit(weights, layer, is_cross):
            if not is_cross:
                return weights[:1].expand_as(weights) if keeps_self else weights
            if not keeps_cross and not factors:
                return weights
            edited = weights.clone()
            if keeps_cross:
                for j, i in aligned:
                    edited[1, ..., j] = proportion[j] * weights[0, ..., i]
            edited[1] = edited[1] * scale
            return edited

        with attention_edited(network, edit):
            return denoise(x_t, t)

    return denoise_both
