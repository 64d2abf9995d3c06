"""FastUNet: the outputs of a UNet, faster, for sampling with a context that stays the same.

It wraps a UNet and is a network like any other: (x_t, t, context, mask) → output. It saves work in
two ways:

    cached keys and values     The context is the same in all sampling steps. `cache_context`
                               prepares it once, and each cross-attention then computes its keys
                               and values once. Tokens that are padding in all captions are
                               removed.
    M captions an image        Guidance needs the outputs of the same images for M = 2 captions.
                               Up to the first cross-attention they are equal, and are computed
                               once. With pooled=True the caption is already in the time embedding:
                               only the first convolution is computed once.

`Denoiser` (diffusion/prediction.py) and `guided` (diffusion/guidance.py) call `cache_context` of a
network that has it. No number depends on it: to read how the network works, read unet.py.

Shapes: B images, M captions an image, so M·B captions, or a single one for all images; C channels,
L tokens of dimension D, heads of d channels. In the methods that are written out from unet.py and
blocks.py, a comment "differs" marks each line that is not the same there.

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py, unet.py,
stable_diffusion_weights.py and weights_io.py.

>>> unet = UNet(channels=(64, 128), context_dim=16)
>>> network = FastUNet(unet)
>>> x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 500])
>>> cache, mask = network.cache_context(torch.randn(4, 5, 16))      # two captions an image
>>> network(x_t, t, cache, mask).shape
torch.Size([4, 3, 16, 16])
"""

import torch
import torch.nn.functional as F
from torch import nn

# torch.compiler.disable without its import of the compiler, which takes seconds
from torch._compile import _disable_dynamo

from .attention_kernels import attend
from .blocks import ResidualBlock, SpatialTransformer, timestep_embedding
from .unet import UNet, masked_mean


class FastUNet(nn.Module):
    """(x_t [B, in_channels, H, W], t [B], context, mask) → [M·B, out_channels, H, W].

    unet: the UNet, whose weights it uses.

    `forward` takes the pair that `cache_context` returns as context and mask, or tensors as UNet
    does: context [M·B or 1, L, D] and mask bool [M·B or 1, L]. The first B captions are for the B
    images, the next B captions for the same images again, and so on.

    Raises ValueError for sizes that do not fit, as UNet does.

    The forward methods of the UNet, of its transformers and of their cross-attention are written
    out below, not called. So their hooks do not run, and `checkpointing` has no effect: to train a
    UNet or to observe it, call the UNet itself.
    """

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    @property
    def size_multiple(self) -> int:
        """Height and width of the images must be multiples of this."""
        return self.unet.size_multiple

    def cache_context(self, context: torch.Tensor, mask: torch.Tensor | None = None):
        """Prepare a context [M·B or 1, L, D] and its mask bool for many calls of `forward`.

        mask: [M·B or 1, L], at least one True in each row; None = all.

        Returns (KeyValueCache, mask without the tokens that are padding in all captions).
        """
        if mask is not None:
            is_used = mask.any(dim=0)  # [L]
            context = context[:, is_used]
            mask = mask[:, is_used]
        return KeyValueCache(context.to(self.unet.conv_in.weight.dtype)), mask

    def forward(self, x, t, context=None, mask=None):
        unet = self.unet
        if context is None:
            return unet(x, t)
        if isinstance(context, torch.Tensor):
            context, mask = self.cache_context(context, mask)
        check_captions_per_image(len(context), len(x))
        unet.check_size(x)

        # `UNet.forward`, with the `apply_stage` of this file. h has B rows before the first layer
        # that depends on the caption, and M·B from there on.
        dtype = unet.conv_in.weight.dtype
        # Time embedding, [B or M·B, 4·channels[0]]
        time_embedding = unet.time(timestep_embedding(t, unet.channels[0]).to(dtype))
        if unet.pool is not None:
            pooled = unet.pool(masked_mean(context.context, mask))
            # differs: B time embeddings become one for each caption
            time_embedding = repeat_batch(time_embedding, len(pooled)) + pooled
        h = unet.conv_in(F.pixel_unshuffle(x.to(dtype), unet.patch))  # [B, channels[0], H/p, W/p]
        skips = [h]
        for stage in unet.down:
            h = apply_stage(stage, h, time_embedding, context, mask)
            skips.append(h)
        h = apply_stage(unet.middle, h, time_embedding, context, mask)
        for stage in unet.up:
            skip = repeat_batch(skips.pop(), len(h))  # differs: a skip may have B rows
            h = torch.cat([h, skip], dim=1)
            h = apply_stage(stage, h, time_embedding, context, mask)
        h = unet.conv_out(F.silu(unet.norm_out(h)))  # [M·B, out_channels·p², H/p, W/p]
        return F.pixel_shuffle(h, unet.patch)  # [M·B, out_channels, H, W]


def make_fast(network):
    """FastUNet(network) for a UNet; any other network as it is.

    A network of a subclass of UNet is another one, since it may have a forward of its own.
    """
    return FastUNet(network) if type(network) is UNet else network


class KeyValueCache:
    """A context [M·B or 1, L, D] that stays the same over sampling steps, with its keys and values.

    Each attention layer computes its keys and values once and finds them here at the following
    steps. They are computed again if the dtype or the layer's weights have changed, and always
    while gradients are enabled.
    """

    def __init__(self, context: torch.Tensor):
        self.context = context
        self.cached = {}  # attention layer → (version of its weights, (keys, values))

    def __len__(self) -> int:
        return len(self.context)

    def project_keys_values(self, attention, dtype):
        """Keys and values of the context for one attention layer, [M·B or 1, heads, L, d] each.

        dtype: of the queries.
        """
        if torch.is_grad_enabled():
            return project_keys_values(attention, self.context)
        key_version = weight_version(attention.to_k.weight)
        value_version = weight_version(attention.to_v.weight)
        version = (dtype, key_version, value_version)
        cached_version, keys_values = self.cached.get(attention, (None, None))
        if cached_version != version:
            keys_values = project_keys_values(attention, self.context)
            self.cached[attention] = (version, keys_values)
        return keys_values


@_disable_dynamo
def project_untraced(cache: KeyValueCache, attention, dtype):
    """`cache.project_keys_values`, which torch.compile calls and does not trace."""
    return cache.project_keys_values(attention, dtype)


def project_keys_values(attention, context):
    """Keys and values of a context [M·B or 1, L, D], [M·B or 1, heads, L, d] each."""
    k = attention.split_heads(attention.to_k(context))
    v = attention.split_heads(attention.to_v(context))
    return k, v


def weight_version(weight: torch.Tensor) -> tuple[int, int]:
    """A pair that changes when the weight moves in memory or is modified in place."""
    in_place_changes = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), in_place_changes


# ---------------------------------------------------------------- the layers, with cached contexts


def apply_stage(stage, h, time_embedding, cache, mask):
    """`apply_stage` of unet.py for h [B or M·B, C, H, W]."""
    for layer in stage:
        if isinstance(layer, ResidualBlock):
            # differs: with pooled=True there is a time embedding for each caption
            h = layer(repeat_batch(h, len(time_embedding)), repeat_batch(time_embedding, len(h)))
        elif isinstance(layer, SpatialTransformer):
            h = apply_transformer(layer, h, cache, mask)  # differs: the function below
        else:
            h = layer(h)
    return h


def apply_transformer(layer, x, cache, mask):
    """`SpatialTransformer.forward` with cached keys and values: x [B or M·B, C, H, W]."""
    block = layer.block
    h = layer.proj_in(layer.norm(x)).flatten(2).transpose(1, 2)  # [B, H·W, C]
    h = h + block.self_attention(block.norm1(h))
    h = repeat_batch(h, len(cache))  # [M·B, H·W, C]; differs: from here on one h a caption
    if block.has_cross_attention:
        # differs: the function below
        h = h + attend_to_cache(block.cross_attention, block.norm2(h), cache, mask)
    h = h + block.feed_forward(block.norm3(h))
    h = layer.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))  # [M·B, C, H, W]
    return repeat_batch(x, len(h)) + h  # differs: x may have B rows


def attend_to_cache(attention, x, cache, mask):
    """`Attention.forward` with cached keys and values: x [M·B, H·W, C] → [M·B, H·W, C]."""
    q = attention.split_heads(attention.to_q(x))  # [M·B, heads, H·W, d]
    # differs: keys and values from the cache, [M·B or 1, heads, L, d] each
    if torch.compiler.is_compiling():
        k, v = project_untraced(cache, attention, q.dtype)
    else:
        k, v = cache.project_keys_values(attention, q.dtype)
    out = attend(q, k, v, mask)  # [M·B, heads, H·W, d]
    return attention.to_out(out.transpose(1, 2).flatten(2))  # [M·B, H·W, C]


def repeat_batch(y: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat y [B, ...] as a whole up to `batch` rows; y itself if it has that many or more."""
    if batch <= len(y):
        return y
    return y.repeat(batch // len(y), *(1,) * (y.ndim - 1))


def check_captions_per_image(captions: int, images: int) -> None:
    """Raise ValueError unless there is one caption for all images, or M for each."""
    if captions != 1 and captions % images:
        raise ValueError(
            f"a context of {captions} captions does not fit {images} images: "
            f"it needs 1 caption or a multiple of {images}"
        )
