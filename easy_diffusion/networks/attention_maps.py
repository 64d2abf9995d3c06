"""Read and change what a UNet attends to, while it runs.

    weights = softmax(Q Kᵀ / sqrt(d))           [B, heads, N, L], each row sums to 1
    output  = edit(weights) V                   the hook of `attention_edited`

In cross-attention row n says how much position n of the image attends to each token of the caption.
So the column of a token, as an image, is the map of where the network looks for it (Hertz et al.,
"Prompt-to-Prompt Image Editing with Cross Attention Control", 2022, section 3).

Outside of the `with` blocks the network is as it was: the fast kernels are used, and the hook costs
nothing. A FastUNet attends in a way of its own and is refused: edit its UNet. So is a network with
another kind of cross-attention, such as an ImagePromptUNet. The attention of a VideoUNet over time
is left as it is.

The file needs torch and, beside it, attention_kernels.py and blocks.py.

>>> from .blocks import SpatialTransformer
>>> network = SpatialTransformer(64, context_dim=16)
>>> with attention_maps(network) as maps:
...     _ = network(torch.randn(2, 64, 8, 8), torch.randn(2, 5, 16))
>>> [(layer, tuple(weights[0].shape)) for layer, weights in maps.items()]
[('block.cross_attention', (2, 4, 64, 5))]
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .attention_kernels import attention_weights
from .blocks import Attention


@contextmanager
def attention_edited(network: nn.Module, edit: Callable) -> Iterator[None]:
    """Within the `with` block, pass all attention weights of a network through `edit`.

    edit: (weights [B, heads, N, L], layer, is_cross) → weights of the same shape. layer is the name
        of the Attention module in the network; is_cross says whether it attends to the context. If
        it returns the tensor that it was given, the layer computes what it always does.

    The network is restored also after an exception. Blocks may be nested: the weights pass through
    the edit of the inner block, then through that of the outer one. Raises ValueError for a network
    without attention that can be edited.
    """
    modules = dict(network.named_modules())
    layers = {name: module for name, module in modules.items() if type(module) is Attention}
    is_other = any(
        isinstance(module, Attention) and name not in layers and "cross" in name
        for name, module in modules.items()
    )
    if not layers or is_other or hasattr(network, "cache_context"):
        raise ValueError(
            f"a {type(network).__name__} has no attention that can be edited; edit a UNet"
        )
    for name, module in layers.items():
        edits = module.__dict__.setdefault("edits", [])             # the outermost first
        edits.append((name, edit))
        module.forward = make_forward(module, edits)
    try:
        yield
    finally:
        for module in layers.values():
            module.edits.pop()
            if not module.edits:
                del module.forward, module.edits


def make_forward(module: Attention, edits: list[tuple[str, Callable]]) -> Callable:
    """The forward of an Attention module whose weights pass through edits, the last one first.

    edits: (name of the layer, edit) each.
    """
    def forward(x, context=None, mask=None):
        source = x if context is None else context
        q = module.split_heads(module.to_q(x))                      # [B, heads, N, d]
        k = module.split_heads(module.to_k(source)).expand(len(x), -1, -1, -1)
        v = module.split_heads(module.to_v(source)).expand(len(x), -1, -1, -1)
        weights = attention_weights(q, k, mask)                     # [B, heads, N, L]
        edited = weights
        for layer, edit in reversed(edits):
            edited = edit(edited, layer, context is not None)
            if edited.shape != weights.shape:
                raise ValueError(
                    f"the edit of {layer} made {tuple(edited.shape)} of weights "
                    f"{tuple(weights.shape)}"
                )
        if edited is weights:
            return Attention.forward(module, x, context, mask)
        out = edited.to(v.dtype) @ v                                # [B, heads, N, d]
        return module.to_out(out.transpose(1, 2).flatten(2))

    return forward


@contextmanager
def attention_maps(network: nn.Module, is_cross: bool = True) -> Iterator[dict[str, list]]:
    """Within the `with` block, record the attention weights of each call of a network.

    Gives a dict: name of the layer → the weights [B, heads, N, L] of its calls, on the CPU.

    is_cross: whether to record the attention to the context, or that among positions.
    """
    maps = {}

    def record(weights, layer, weights_are_cross):
        if weights_are_cross == is_cross:
            maps.setdefault(layer, []).append(weights.detach().cpu())
        return weights

    with attention_edited(network, record):
        yield maps


def token_maps(weights: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where each token is attended to, the mean over heads: [B, heads, H·W, L] → [B, L, H, W].

    height, width: of the feature map of the layer.
    """
    return weights.mean(dim=1).transpose(1, 2).unflatten(2, (height, width))
