"""Attention, softmax(Q Kᵀ / sqrt(d)) V, by the kernel that is fastest on the device at hand.

`plain_attention` is the formula (Vaswani et al., "Attention Is All You Need", 2017, eq. 1). Two
other functions give the same numbers:

    chunked_attention                         the formula for a few images at a time
    torch's scaled_dot_product_attention      a fused kernel, which never stores the scores

On a CPU and with few keys the formula is faster than the fused kernel, above all in training,
because the kernel's backward pass is slow there. Otherwise the fused kernel is faster. `attend`
makes this choice; `Attention` of blocks.py calls it.

Shapes: B images, N queries, L keys, d channels of each head. A mask is bool [B, L], True = a key
that may be attended to, with at least one True in each row, since a softmax over no keys is NaN;
even an empty caption has its start token. The file needs only torch.

>>> q = torch.randn(2, 4, 9, 8)                             # [B, heads, N, d]
>>> k = torch.randn(2, 4, 5, 8)                             # [B, heads, L, d]
>>> v = torch.randn(2, 4, 5, 8)                             # [B, heads, L, d]
>>> mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
>>> out = attend(q, k, v, mask)
>>> torch.allclose(out, plain_attention(q, k, v, mask), atol=1e-6)
True
"""

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- the formula


def attention_weights(q, k, mask=None) -> torch.Tensor:
    """softmax(Q Kᵀ / sqrt(d)): how much each query attends to each key; the rows sum to 1.

    q [B, heads, N, d], k [B, heads, L, d], mask bool [B, L] → [B, heads, N, L].
    """
    # Scaling q costs N·d multiplications, scaling the scores N·L; mostly d < L.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, N, L]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)


def plain_attention(q, k, v, mask=None) -> torch.Tensor:
    """softmax(Q Kᵀ / sqrt(d)) V, [B, heads, N, d].

    q [B, heads, N, d], k and v [B, heads, L, d], mask bool [B, L].
    """
    return attention_weights(q, k, mask) @ v


# ---------------------------------------------------------------- the same numbers, faster

# Number of scores at a time that `chunked_attention` aims at: 32 MB in float32. A single image can
# have more. A CPU process fetches larger memory blocks from the operating system anew each time,
# page by page, which took a tenth of a training step.
MAX_SCORES = 2**23


def chunked_attention(q, k, v, mask=None) -> torch.Tensor:
    """`plain_attention` for as many images at a time as MAX_SCORES allows, but at least one.

    Every argument must have all B images; `attend` expands them.
    """
    scores_per_image = q.shape[1] * q.shape[2] * k.shape[2]  # heads · N · L
    chunk = max(1, MAX_SCORES // scores_per_image)  # images at a time
    masks = mask.split(chunk) if mask is not None else [None] * len(q)
    chunks = zip(q.split(chunk), k.split(chunk), v.split(chunk), masks)
    return torch.cat([plain_attention(*arguments) for arguments in chunks])


# Largest number of keys for which a CPU uses `chunked_attention` instead of the fused kernel.
MAX_PLAIN_KEYS = 512


def attend(q, k, v, mask=None) -> torch.Tensor:
    """The numbers of `plain_attention` by the fastest kernel, [B, heads, N, d].

    q: [B, heads, N, d].
    k, v: [B, heads, L, d], or [1, heads, L, d] to use one context for every image.
    mask: bool [B, L] or [1, L], True = a key that may be attended to; None = all.
    """
    k = k.expand(len(q), -1, -1, -1)  # [B, heads, L, d]
    v = v.expand(len(q), -1, -1, -1)  # [B, heads, L, d]
    if mask is not None:
        mask = mask.expand(len(q), -1)  # [B, L]
    if q.device.type == "cpu" and k.shape[-2] <= MAX_PLAIN_KEYS:
        return chunked_attention(q, k, v, mask)
    attn_mask = mask[:, None, None, :] if mask is not None else None  # [B, 1, 1, L]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
