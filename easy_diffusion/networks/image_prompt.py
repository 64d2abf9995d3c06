"""An image as a prompt: "this table and this plate, that dish".

    out = softmax(Q Kᵀ / sqrt(d)) V  +  scale · softmax(Q K'ᵀ / sqrt(d)) V'

K and V come from the tokens of the caption, as in every cross-attention; K' and V' come from the
tokens of a reference image, by projections of their own (Ye et al., "IP-Adapter: Text Compatible
Image Prompt Adapter for Text-to-Image Diffusion Models", 2023, section 3.2). The queries are the
same. The UNet is frozen. Here K' begins as a copy of K, and V' at zero, so that an untrained
adapter changes no bit of the output.

`ImageEncoder` makes the tokens of the reference image, with the contract of a text encoder. The
two contexts are concatenated, that of the image first, so that an ImagePromptUNet is called like
any other network:

    encoder = JointEncoder(image_encoder, text_encoder)             (joint_encoder.py)
    context, mask = encoder([(image, "番茄鸡蛋"), ("", "豆腐")])

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py, unet.py,
stable_diffusion_weights.py and weights_io.py.

>>> unet = UNet(channels=(64, 128), context_dim=32)
>>> encoder = ImageEncoder(dim=32)
>>> network = ImagePromptUNet.from_unet(unet, image_tokens=encoder.tokens)
>>> x_t, t, text = torch.randn(2, 3, 16, 16), torch.tensor([10, 500]), torch.randn(2, 5, 32)
>>> image_context, _ = encoder([torch.zeros(3, 64, 64, dtype=torch.uint8), ""])
>>> torch.equal(network(x_t, t, torch.cat([image_context, text], dim=1)), unet(x_t, t, text))
True
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention_kernels import attend
from .blocks import Attention, SpatialTransformer, zero_init
from .unet import UNet

GRID = 4                # the tokens of an image are GRID × GRID regions, after a start token


class ImageEncoder(nn.Module):
    """Images → context [B, 1 + GRID², dim] and mask bool [B, 1 + GRID²].

    An image is uint8 [3, H, W], the same size for all in a batch, H and W multiples of 4 · GRID; or
    "" for none, which has the start token alone.

    dim: D. width: channels of the convolutions, a multiple of 8.

    `forward` raises ValueError for what is no such image.
    """

    uncond = ""
    tokens = 1 + GRID ** 2

    def __init__(self, dim: int = 128, width: int = 64):
        super().__init__()
        self.dim = dim
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU(),
            nn.AdaptiveAvgPool2d(GRID),
            nn.Conv2d(2 * width, dim, 1),
        )
        self.position = nn.Parameter(torch.randn(GRID ** 2, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: list) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.start.device
        for image in images:
            check_image(image)
        has_image = torch.tensor([not isinstance(image, str) for image in images])
        given = [image.to(device) for image in images if not isinstance(image, str)]
        if len({image.shape for image in given}) > 1:
            sizes = ", ".join(sorted({str(tuple(image.shape)) for image in given}))
            raise ValueError(f"the reference images of a batch have one size, not {sizes}")
        h = self.position.new_zeros(len(images), GRID ** 2, self.dim)
        if given:
            x = torch.stack(given).to(self.start) / 127.5 - 1               # [N, 3, H, W]
            tokens = self.layers(x).flatten(2).transpose(1, 2) + self.position
            h[has_image.nonzero().flatten().to(device)] = tokens.to(h.dtype)
        context = torch.cat([self.start.expand(len(images), 1, -1), h], dim=1)
        mask = has_image[:, None].expand(-1, GRID ** 2).to(device)
        return self.norm(context), F.pad(mask, (1, 0), value=True)


def check_image(image) -> None:
    """Raise ValueError unless this is an image uint8 [3, H, W], or ""."""
    if isinstance(image, str) and image == "":
        return
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        channels, height, width = image.shape
        if channels == 3 and height % (4 * GRID) == width % (4 * GRID) == 0:
            return
    given = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "dtype") else repr(image)
    raise ValueError(
        f'a reference image is uint8 [3, H, W], H and W multiples of {4 * GRID}, or "" for none, '
        f"not {given}"
    )


class DecoupledAttention(Attention):
    """Cross-attention to the tokens of a caption and, beside them, of an image.

    image_tokens: I; the first I of the L tokens of the context are those of the image.
    scale: of what the image adds; an attribute that may be changed.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, image_tokens: int):
        super().__init__(dim, context_dim, heads)
        self.image_tokens = image_tokens
        self.scale = 1.0
        self.to_k_image = nn.Linear(context_dim, dim, bias=False)
        self.to_v_image = zero_init(nn.Linear(context_dim, dim, bias=False))

    def forward(self, x, context=None, mask=None):
        image, text = split_tokens(context, self.image_tokens)
        image_mask, text_mask = split_tokens(mask, self.image_tokens)
        q = self.split_heads(self.to_q(x))                                  # [B, heads, N, d]
        k, v = (self.split_heads(layer(text)) for layer in (self.to_k, self.to_v))
        out = attend(q, k, v, text_mask)
        k, v = (self.split_heads(layer(image)) for layer in (self.to_k_image, self.to_v_image))
        out = out + self.scale * attend(q, k, v, image_mask)
        return self.to_out(out.transpose(1, 2).flatten(2))                  # [B, N, C]


def split_tokens(y, image_tokens: int):
    """The tokens of the image and those of the caption, of a context or a mask [B, L, ...]."""
    return (None, None) if y is None else (y[:, :image_tokens], y[:, image_tokens:])


class ImagePromptUNet(UNet):
    """A UNet that also attends to an image, whose tokens are the first ones of the context.

    image_tokens: their number. settings: those of UNet, by name; with a context_dim.

    The pooled caption, if the UNet has one, is that of the caption alone.
    """

    def __init__(self, image_tokens: int, **settings):
        super().__init__(**settings)
        self.settings |= dict(image_tokens=image_tokens)
        self.image_tokens = image_tokens
        for module in self.modules():
            if isinstance(module, SpatialTransformer):
                attention = module.block.cross_attention
                module.block.cross_attention = DecoupledAttention(
                    attention.to_q.in_features, self.context_dim, attention.heads, image_tokens
                )

    @classmethod
    def from_unet(cls, unet: UNet, image_tokens: int) -> "ImagePromptUNet":
        """Add an adapter to a trained UNet. Raises ValueError for one without a context."""
        if unet.context_dim is None:
            raise ValueError("a UNet without a context has no cross-attention for an image")
        network = cls(image_tokens, **unet.settings)
        state = network.state_dict() | unet.state_dict()
        for name in state:
            if name.endswith("to_k_image.weight"):
                state[name] = state[name.replace("to_k_image", "to_k")]
        network.load_state_dict(state)
        return network.to(unet.conv_in.weight)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapter; all others are those of the UNet."""
        return [parameter for name, parameter in self.named_parameters() if "_image." in name]

    def set_scale(self, scale: float) -> None:
        """Set how much the image adds: 0 is the UNet alone, 1 is what was trained."""
        for module in self.modules():
            if isinstance(module, DecoupledAttention):
                module.scale = scale

    def embed_time(self, t, context=None, mask=None):
        _, context = split_tokens(context, self.image_tokens)
        _, mask = split_tokens(mask, self.image_tokens)
        return super().embed_time(t, context, mask)
