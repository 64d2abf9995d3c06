"""ControlNet: an image steers what a trained UNet generates, such as a layout or an edge map.

    h_0 = conv_in(x_t) + hint(control)
    h_i = stage_i(h_{i-1}, t, context)          the way down and the middle, copied from the UNet
    r_i = zero_i(h_i)                           one residual for each stored output, and the middle
    UNet: stored output i ← stored output i + scale · r_i,    middle ← middle + scale · r_middle

(Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023, section 3.)

The UNet is frozen. The copy begins with its weights, so that it understands images from the start.
zero_i is a 1×1 convolution whose parameters begin at zero, and so is the last layer of the hint
encoder: an untrained ControlNet changes no bit of the output. Its gradient is not zero, because
∂(w h)/∂w = h.

The hint encoder brings the control to the resolution of h_0. There are two:

    squares of pixels become channels (pixel unshuffle); two convolutions with SiLU; a zero one
    Stable Diffusion's: convolutions of 16, 32, 96, 256 channels, three of them with stride 2

`Controlled` joins a UNet with controls and is a network like any other, so that samplers, guidance
and inpainters take it as it is:

    network = Controlled(unet, [Control(controlnet, layout)])

`ControlTraining` is the network for the training, whose batches have the control as an extra.

The file needs torch, safetensors and, beside it, attention_kernels.py, blocks.py, motion.py,
unet.py, stable_diffusion_weights.py and weights_io.py.

>>> unet = UNet(channels=(64, 128), context_dim=16)
>>> controlnet = ControlNet.from_unet(unet, control_channels=4)
>>> x_t, t, context = torch.randn(2, 3, 16, 16), torch.tensor([10, 500]), torch.randn(2, 5, 16)
>>> network = Controlled(unet, [Control(controlnet, torch.rand(2, 4, 16, 16))])
>>> torch.equal(network(x_t, t, context), unet(x_t, t, context))
True
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import zero_init
from .motion import frames_to_batch
from .stable_diffusion_weights import load_stable_diffusion
from .unet import UNet
from .weights_io import check_unet, compute_weights_checksum, load_tree, load_weights, save_tree


class ControlNet(UNet):
    """(x_t, t, control, context, mask) → residuals for a UNet, finest first, the middle's last.

    x_t, t, context and mask are those of the UNet. control is [B or 1, control_channels, f·H, f·W]
    in [0, 1] for x_t [B, C, H, W].

    control_channels: channels of the control.
    factor: f, side in pixels of what is one pixel of x_t: 1 for a UNet of images, 8 for the latents
        of an autoencoder with factor 8.
    hint_channels: channels of the convolutions of Stable Diffusion's hint encoder, which halves the
        size once less than it has entries; None: the hint encoder of squares.
    settings: those of the UNet, by name.

    Raises ValueError for hint_channels that do not lead to the resolution of the UNet; `forward`
    for a control of a wrong shape.
    """

    def __init__(
        self,
        control_channels: int = 3,
        factor: int = 1,
        hint_channels: Sequence[int] | None = None,
        **settings,
    ):
        super().__init__(**settings)
        del self.up, self.norm_out, self.conv_out
        self.settings |= dict(
            control_channels=control_channels, factor=factor, hint_channels=hint_channels
        )
        self.control_channels = control_channels
        self.factor = factor
        self.hint_channels = hint_channels
        if hint_channels is None:
            self.hint = make_square_encoder(control_channels, factor * self.patch, self.channels[0])
        elif 2 ** (len(hint_channels) - 1) == factor * self.patch:
            self.hint = make_strided_encoder(control_channels, hint_channels, self.channels[0])
        else:
            raise ValueError(
                f"hint_channels {tuple(hint_channels)} halve the control {len(hint_channels) - 1} "
                f"times, but its squares of {factor * self.patch}×{factor * self.patch} pixels are "
                "one position"
            )
        self.zero_convs = nn.ModuleList(
            zero_init(nn.Conv2d(channels, channels, 1)) for channels in self.stored_channels
        )
        self.zero_middle = zero_init(nn.Conv2d(self.channels[-1], self.channels[-1], 1))

    @classmethod
    def from_unet(
        cls, unet: UNet, control_channels: int, factor: int = 1, hint_channels=None
    ) -> "ControlNet":
        """Build a ControlNet for a trained UNet; its encoder begins with the UNet's weights."""
        controlnet = cls(control_channels, factor, hint_channels, **unet.settings)
        own = controlnet.state_dict()
        copied = {name: tensor for name, tensor in unet.state_dict().items() if name in own}
        controlnet.load_state_dict(own | copied)
        return controlnet.to(unet.conv_in.weight)

    @classmethod
    def stable_diffusion_15(cls, path=None) -> "ControlNet":
        """A ControlNet of Stable Diffusion 1.5, 361 M weights; control [B, 3, 8·H, 8·W].

        path: published weights, see `load_stable_diffusion`; None: random ones.
        """
        controlnet = cls(3, 8, (16, 32, 96, 256), **UNet.stable_diffusion_15().settings)
        if path is not None:
            load_stable_diffusion(controlnet, path)
        return controlnet

    def forward(self, x, t, control, context=None, mask=None) -> list[torch.Tensor]:
        self.check_context(context, mask, len(x))
        self.check_size(x)
        self.check_control(control, x)
        dtype = self.conv_in.weight.dtype
        x, control = x.to(dtype), control.to(dtype)
        if context is not None:
            context = context.to(dtype)

        # The way down and the middle of `UNet.forward`; the hint is added to the first output.
        time_embedding = self.embed_time(t, context, mask)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch)) + self.hint(control)
        stored = [h]
        for stage in self.down:
            h = self.run_stage(stage, h, time_embedding, context, mask)
            stored.append(h)
        h = self.run_stage(self.middle, h, time_embedding, context, mask)
        residuals = [zero_conv(s) for zero_conv, s in zip(self.zero_convs, stored)]
        return [*residuals, self.zero_middle(h)]

    def check_control(self, control, x) -> None:
        """Raise ValueError unless a control fits the noisy images x."""
        height, width = (self.factor * side for side in x.shape[2:])
        expected = (self.control_channels, height, width)
        if tuple(control.shape[1:]) != expected or len(control) not in (1, len(x)):
            raise ValueError(
                f"for {len(x)} noisy images of {tuple(x.shape[1:])} the control must be "
                f"{len(x)} or 1 of {expected}, not {tuple(control.shape)}"
            )


def make_square_encoder(control_channels: int, side: int, channels: int) -> nn.Module:
    """The hint encoder of squares: [B, control_channels, side·H, side·W] → [B, channels, H, W]."""
    return nn.Sequential(
        nn.PixelUnshuffle(side),
        nn.Conv2d(control_channels * side ** 2, channels, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.SiLU(),
        zero_init(nn.Conv2d(channels, channels, 3, padding=1)),
    )


def make_strided_encoder(
    control_channels: int, hint_channels: Sequence[int], channels: int
) -> nn.Module:
    """Stable Diffusion's hint encoder, which halves the size between its channel numbers."""
    layers = [nn.Conv2d(control_channels, hint_channels[0], 3, padding=1), nn.SiLU()]
    for c_in, c_out in zip(hint_channels, hint_channels[1:]):
        layers += [nn.Conv2d(c_in, c_in, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, stride=2), nn.SiLU()]
    layers.append(zero_init(nn.Conv2d(hint_channels[-1], channels, 3, padding=1)))
    return nn.Sequential(*layers)


# ---------------------------------------------------------------- a UNet with controls


class Control(NamedTuple):
    """A ControlNet, and the image with which it steers.

    control: [B or 1, C, H, W] in [0, 1], see ControlNet.
    scale: factor of its residuals; one number, or one for each residual, such as `guess_scales`.
    interval: (lowest, highest) timestep at which it steers, if all of a batch are in it; None: at
        all timesteps.
    """

    controlnet: ControlNet
    control: torch.Tensor
    scale: float | Sequence[float] = 1.0
    interval: tuple[float, float] | None = None


class Controlled(nn.Module):
    """A UNet with controls: (x_t, t, context, mask) → output, a network like any other.

    A VideoUNet takes films of controls, [B or 1, C, F, H, W], and each frame has its control.

    The residuals of several controls are added. For guidance with the control in the conditional
    prediction alone ("guess mode"), give the unconditional denoiser the UNet itself.

    Raises ValueError for a control with values outside of [0, 1].
    """

    def __init__(self, unet: UNet, controls: Sequence[Control]):
        super().__init__()
        for _, control, *_ in controls:
            low, high = control.min(), control.max()
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"the values of a control must be in [0, 1], not {low:.3g} … {high:.3g}"
                )
        self.unet = unet
        self.controlnets = nn.ModuleList(each.controlnet for each in controls)
        self.controls = list(controls)

    @property
    def size_multiple(self) -> int:
        """Height and width of the images must be multiples of this."""
        return self.unet.size_multiple

    def forward(self, x, t, context=None, mask=None):
        total = None
        for controlnet, control, scale, interval in self.controls:
            if interval is not None and (t.min() < interval[0] or t.max() > interval[1]):
                continue
            control = control.to(x.device)
            if x.ndim == 5:
                residuals = control_frames(controlnet, x, t, control, context, mask)
            else:
                residuals = controlnet(x, t, control, context, mask)
            scales = scale if isinstance(scale, Sequence) else [scale] * len(residuals)
            if len(scales) != len(residuals):
                raise ValueError(f"{len(scales)} scales do not fit {len(residuals)} residuals")
            residuals = [s * r for s, r in zip(scales, residuals)]
            total = residuals if total is None else [a + b for a, b in zip(total, residuals)]
        return self.unet(x, t, context, mask, residuals=total)


def control_frames(controlnet: ControlNet, x, t, control, context, mask) -> list[torch.Tensor]:
    """The residuals for each frame of films x [B, C, F, H, W]: [B·F, ...] each.

    control: [B or 1, C, F, H, W]. context: [B or 1, L, D], or [B or 1, F, L, D] for each frame.

    Raises ValueError for a control that is no film.
    """
    if control.ndim != 5:
        raise ValueError(
            f"the control of a film is [B, C, F, H, W], not of the shape {tuple(control.shape)}"
        )
    controls = control.expand(len(x), *control.shape[1:]).transpose(1, 2).flatten(0, 1)
    images, t, context, mask = frames_to_batch(x, t, context, mask)
    return controlnet(images, t, controls, context, mask)


class Frozen:
    """Holds a UNet, so that it is no submodule of a module, and is not copied with it."""

    def __init__(self, unet: UNet):
        self.unet = unet

    def __deepcopy__(self, memo):
        return self


class ControlTraining(nn.Module):
    """The network that trains a ControlNet: (x_t, t, context, mask, control) → output of the UNet.

    unet: it is frozen, and not part of this module's parameters, state dict and checkpoints. A deep
        copy, such as that of the EMA, has the same UNet.
    control: [B, C, H, W] in [-1, 1], since the training maps all images from uint8 to that range.
    """

    def __init__(self, unet: UNet, controlnet: ControlNet):
        super().__init__()
        self.controlnet = controlnet
        self.frozen = Frozen(unet.requires_grad_(False).eval())
        # Compared when a training resumes
        self.settings = controlnet.settings | {"unet": compute_weights_checksum(unet)}

    def forward(self, x, t, context=None, mask=None, control=None):
        residuals = self.controlnet(x, t, (control + 1) / 2, context, mask)
        return self.frozen.unet(x, t, context, mask, residuals=residuals)


# ---------------------------------------------------------------- files


def save_controlnet(path, controlnet: ControlNet, unet: UNet, note: str = "") -> None:
    """Write a ControlNet in half precision, with what rebuilds it and the checksum of its UNet.

    unet: the UNet that it was trained for. note: what its control is, such as "edges".
    """
    tree = {
        "controlnet": controlnet.settings,
        "note": note,
        "unet": compute_weights_checksum(unet),
        "weights": {name: tensor.half() for name, tensor in controlnet.state_dict().items()},
    }
    save_tree(path, tree)


def load_controlnet(path, unet: UNet) -> tuple[ControlNet, str]:
    """Rebuild the ControlNet that `save_controlnet` wrote, in eval mode: (ControlNet, its note).

    unet: the UNet that it was trained for; its device is that of the result.

    Raises FileNotFoundError, or ValueError for a file that is damaged, not of a ControlNet, or of
    one for another UNet.
    """
    saved = load_tree(path)
    if not isinstance(saved, dict) or "controlnet" not in saved:
        raise ValueError(f"{path} is a checkpoint, but not one of a ControlNet")
    check_unet(path, saved["unet"], unet)
    controlnet = ControlNet(**saved["controlnet"])
    load_weights(controlnet, saved["weights"])
    return controlnet.to(unet.conv_in.weight).eval(), saved["note"]


# ---------------------------------------------------------------- scales


def guess_scales(count: int) -> list[float]:
    """The scales of `count` residuals from 0.1 at the finest to 1 at the middle, geometric.

    With them a control without a caption steers the coarse layout more than the details
    (Zhang et al. 2023, "guess mode" of the published code).
    """
    return torch.logspace(-1, 0, count).tolist()
