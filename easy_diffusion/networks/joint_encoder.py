"""Two conditions at once: a sound and a caption, a reference image and a caption, beats of a film.

An encoder turns a list of captions, whatever they are, into a context and a mask. Here a caption is
a pair, and each part has an encoder of its own. Their tokens are concatenated, so that the network
attends to both.

The file needs torch; its example also text_encoder.py and weights_io.py beside it.

>>> from .text_encoder import CharacterEncoder
>>> encoder = JointEncoder(CharacterEncoder("炒汤", dim=16), CharacterEncoder("番茄鸡蛋", dim=16))
>>> context, mask = encoder([("炒", "番茄鸡蛋"), ("", "鸡蛋")])
>>> tuple(context.shape), mask.sum(dim=1).tolist()          # with two start tokens each
((2, 7, 16), [7, 4])
"""

import torch
from torch import nn


class JointEncoder(nn.Module):
    """Two encoders as one: pairs (a, b) → the context and mask of a, followed by those of b.

    Either part of a pair can be left out by its encoder's `uncond`.

    first, second: encoders with the same `dim`, else ValueError.
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        if first.dim != second.dim:
            raise ValueError(f"the encoders differ in dim: {first.dim} and {second.dim}")
        self.first = first
        self.second = second
        self.dim = first.dim
        self.uncond = (first.uncond, second.uncond)

    def forward(self, pairs: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = zip(*check_pairs(pairs))
        contexts, masks = zip(self.first(list(first)), self.second(list(second)))
        return torch.cat(contexts, dim=1), torch.cat(masks, dim=1)


class BeatEncoder(nn.Module):
    """Pairs (caption, beats) → a context [B, F, L, D] for each frame of a film, and its mask.

    The last token of frame f is a linear function of its beat. A VideoUNet takes such a context.

    beats: a tensor, float [F] in [0, 1], of the same F in a batch, else ValueError; None: without,
        all frames alike. If all pairs of a batch have None, the context is [B, L, D], that of the
        captions.

    encoder: of the captions.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.dim = encoder.dim
        self.beat = nn.Linear(1, encoder.dim)
        self.uncond = (encoder.uncond, None)

    def forward(self, pairs: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
        captions, beats = zip(*check_pairs(pairs))
        context, mask = self.encoder(list(captions))                        # [B, L - 1, D]
        given = [beat is not None for beat in beats]
        if not any(given):
            return context, mask
        frames = len(beats[given.index(True)])
        for beat in beats:
            if beat is not None and tuple(getattr(beat, "shape", ())) != (frames,):
                raise ValueError(f"beats are a float tensor [{frames}] for all films, not {beat!r}")
        values = [torch.zeros(frames) if beat is None else torch.as_tensor(beat) for beat in beats]
        tokens = self.beat(torch.stack(values).to(context)[..., None])      # [B, F, D]
        has_beat = torch.tensor(given, device=mask.device)[:, None, None].expand(-1, frames, 1)
        context = context[:, None].expand(-1, frames, -1, -1)
        mask = mask[:, None].expand(-1, frames, -1)
        return torch.cat([context, tokens[:, :, None]], dim=2), torch.cat([mask, has_beat], dim=2)


def check_pairs(pairs: list) -> list:
    """Return pairs, or raise ValueError for captions that are none."""
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"this encoder takes pairs, not {pair!r}")
    return pairs
