"""From a caption to what the network looks at: states [B, L, D] and a mask [B, L], True = a real token.

Chinese needs no tokenizer to begin with: each character is a word's worth of meaning. CharacterEncoder looks its
characters up in a table and lets a small transformer (Vaswani et al. 2017) put them together, so that 豆 in 土豆 (potato)
and 豆 in 豆腐 (tofu) become different states. It is trained together with the network. An empty caption is a start token
alone: that is the «nothing» of classifier-free guidance. The file needs nothing but torch.

>>> encoder = CharacterEncoder("番茄炒鸡蛋土豆汤", dim=64)
>>> states, mask = encoder(["番茄炒鸡蛋", "土豆汤", ""])
>>> tuple(states.shape), mask.sum(dim=1).tolist()
((3, 6, 64), [6, 4, 1])
"""

import warnings

import torch
from torch import nn


class CharacterEncoder(nn.Module):
    """Captions → states [B, L, dim] and mask bool [B, L]; L is the longest caption of the call and a start token.

    characters: those it knows, in any order. A character it does not know is named in a warning, once, and encoded as
    «unknown». Raises ValueError for a caption of more than max_length - 1 characters.
    """

    PADDING, START, UNKNOWN = 0, 1, 2

    def __init__(self, characters: str, dim: int = 128, layers: int = 2, heads: int = 4, max_length: int = 32):
        super().__init__()
        self.characters, self.dim, self.max_length = "".join(sorted(set(characters))), dim, max_length
        self.index = {character: i + 3 for i, character in enumerate(self.characters)}
        self.warned = set()
        self.embedding = nn.Embedding(len(self.index) + 3, dim)
        self.position = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """int64 [B, L]: start, then each character, then padding."""
        if isinstance(captions, str):
            raise TypeError(f"captions is a list of str: [{captions!r}], not {captions!r}")
        longest = max(captions, key=len)
        if len(longest) >= self.max_length:
            raise ValueError(f"a caption has at most {self.max_length - 1} characters; {longest!r} has {len(longest)}")
        unknown = set("".join(captions)) - self.index.keys() - self.warned
        if unknown:
            self.warned |= unknown
            names = "、".join(sorted(unknown))
            warnings.warn(f"unknown to this encoder, so without a meaning of their own: {names}", stacklevel=3)
        rows = torch.full((len(captions), len(longest) + 1), self.PADDING)
        for row, caption in zip(rows, captions):
            row[:len(caption) + 1] = torch.tensor([self.START] + [self.index.get(c, self.UNKNOWN) for c in caption])
        return rows.to(self.position.device)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokens(captions)
        mask = tokens != self.PADDING                                       # [B, L]
        states = self.embedding(tokens) + self.position[:tokens.shape[1]]   # [B, L, dim]
        states = self.transformer(states, src_key_padding_mask=~mask)       # [B, L, dim]
        return self.norm(states), mask
