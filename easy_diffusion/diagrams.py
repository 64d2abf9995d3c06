"""Diagrams of the methods, drawn with matplotlib for notebooks and READMEs.

    draw_data_flow          from a caption and noise to an image, and the training beside it
    draw_latent_pipeline    the same in the latent space of an autoencoder
    draw_unet               the levels of a UNet, with the shapes that one forward pass has
    draw_cross_attention    how the token embeddings of a caption reach the positions of an image
    draw_guidance           classifier-free guidance as an extrapolation between two predictions
    draw_repaint            one step of RePaint
    draw_controlnet         a UNet and its ControlNet, with the shapes of their residuals
    draw_video_unet         a stage of a UNet of films, and the motion module behind it

Each function returns a matplotlib figure. The file needs matplotlib, and torch for `draw_unet` and
`draw_controlnet`.

>>> figure = draw_guidance()
>>> type(figure).__name__
'Figure'
"""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DATA, NETWORK, RESULT, FIXED = "#fde8c8", "#cfe3f7", "#d8efd3", "#eeeeee"


class Diagram:
    """Boxes and arrows on a plane whose unit is about half an inch.

    width, height: size of the plane.
    """

    def __init__(self, width: float, height: float):
        self.figure, self.axes = plt.subplots(figsize=(0.55 * width, 0.55 * height))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")
        self.figure.subplots_adjust(0, 0, 1, 1)
        plt.close(self.figure)                  # a notebook shows the figure that a cell returns

    def box(self, x, y, text, color, width=2.6, height=1.0):
        """Draw a box around (x, y); returns (x, y, width, height) for `arrow`."""
        self.axes.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height,
            boxstyle="round,pad=0,rounding_size=0.12", facecolor=color, edgecolor="#555555",
        ))
        self.text(x, y, text)
        return x, y, width, height

    def text(self, x, y, text, size=8, **options):
        """Write text around (x, y)."""
        self.axes.text(x, y, text, ha="center", va="center", fontsize=size, **options)

    def arrow(self, start, end, label="", bend=0.0, color="#333333", offset=(0, 0.22)):
        """Draw an arrow between two boxes, or between two points (x, y).

        label: text beside its middle, at `offset`. bend: curvature, 0 is straight.
        """
        a, b = edge_point(start, end), edge_point(end, start)
        self.axes.add_patch(FancyArrowPatch(
            a, b, arrowstyle="-|>", mutation_scale=10, color=color,
            connectionstyle=f"arc3,rad={bend}", shrinkA=1, shrinkB=1,
        ))
        middle = (a[0] + b[0]) / 2 + offset[0], (a[1] + b[1]) / 2 + offset[1]
        self.text(*middle, label, size=7, color=color)


def edge_point(box, towards):
    """The point where the line from a box's centre to another box leaves the box."""
    if len(box) == 2:
        return box
    x, y, width, height = box
    dx, dy = towards[0] - x, towards[1] - y
    scale = min(
        width / 2 / abs(dx) if dx else float("inf"),
        height / 2 / abs(dy) if dy else float("inf"),
    )
    return x + dx * min(scale, 1), y + dy * min(scale, 1)


def draw_data_flow():
    """From a caption and noise to an image (above), and one training step (below)."""
    d = Diagram(20, 6.5)
    d.text(1.2, 6.1, "sampling", weight="bold", family="DejaVu Sans")
    caption = d.box(1.8, 5.2, "caption\n番茄炒鸡蛋", DATA)
    encoder = d.box(5.6, 5.2, "encoder", NETWORK)
    noise = d.box(5.6, 3.7, "noise $x_T$\n[1, 3, H, W]", DATA)
    network = d.box(10.4, 4.45, "network\n$(x_t, t, context)$", NETWORK, 3.2, 1.2)
    sampler = d.box(14.8, 4.45, "sampler step\n$x_t → x_s$", FIXED)
    image = d.box(18.4, 4.45, "image $x_0$", RESULT, 2.2)
    d.arrow(caption, encoder)
    d.arrow(encoder, network, "context, mask", offset=(0.4, 0.4))
    d.arrow(noise, network)
    d.arrow(network, sampler, "prediction")
    d.arrow(sampler, image)
    d.arrow((14.8, 3.9), (10.4, 3.8), "25 times", bend=-0.35, offset=(0, -1.0))

    d.text(1.2, 2.55, "training", weight="bold", family="DejaVu Sans")
    data = d.box(1.8, 1.55, "dataset\n(image, caption)", DATA)
    noisy = d.box(6.6, 1.55, "$x_t = α_t x_0 + σ_t ε$\nrandom $t$, $ε$", FIXED, 3.6)
    network = d.box(11.4, 1.55, "network", NETWORK)
    loss = d.box(15.4, 1.55, "loss\n$|| output - target ||^2$", FIXED, 3.2)
    d.arrow(data, noisy, "$x_0$")
    d.arrow(noisy, network)
    d.arrow(network, loss)
    d.arrow((15.4, 1.0), (11.4, 1.0), "gradient", bend=-0.3, offset=(0, -0.72))
    return d.figure


def draw_latent_pipeline():
    """Training and sampling in the latent space of an autoencoder."""
    d = Diagram(20, 5.6)
    image = d.box(1.7, 4.2, "images\n[B, 3, 128, 128]", DATA, 2.8)
    encode = d.box(5.6, 4.2, "autoencoder.encode", NETWORK, 3.2)
    latent = d.box(9.8, 4.2, "latents, stored once\n[B, 16, 16, 16]", DATA, 3.6)
    train = d.box(14.2, 4.2, "train the UNet", FIXED, 2.8)
    d.arrow(image, encode)
    d.arrow(encode, latent)
    d.arrow(latent, train)
    noise = d.box(1.7, 1.4, "noise\n[1, 16, 16, 16]", DATA, 2.8)
    network = d.box(9.8, 1.4, "UNet, 25 steps", NETWORK, 3.6)
    decode = d.box(14.2, 1.4, "autoencoder.decode", NETWORK, 3.2)
    result = d.box(18.3, 1.4, "image\n[1, 3, 128, 128]", RESULT, 2.8)
    d.arrow(noise, network, "64 times fewer positions than pixels")
    d.arrow(network, decode, "latent")
    d.arrow(decode, result)
    d.arrow(train, network, "weights", offset=(0.7, 0.1))
    return d.figure


def draw_unet(network, size: int, context=None, mask=None):
    """The levels of a UNet, with the shapes of one forward pass of an image [1, C, size, size].

    network: UNet. context, mask: [1, L, D] and [1, L] if the network needs them.
    """
    import torch

    outputs = {}                                # module → shape of its output, [C, H, W]

    def note(module, inputs, output):
        outputs[module] = list(output.shape[1:])

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    weight = next(network.parameters())
    x = torch.zeros(1, network.settings["in_channels"], size, size, device=weight.device)
    t = torch.zeros(1, dtype=torch.int64, device=weight.device)
    with torch.no_grad():
        network(x, t, context, mask)
    for hook in hooks:
        hook.remove()

    def describe(stage):
        names = " + ".join(BLOCK_NAMES[type(module).__name__] for module in stage)
        return f"{names}\n{outputs[stage[-1]]}"

    down = [f"first convolution\n{outputs[network.conv_in]}", *map(describe, network.down)]
    up = [describe(stage) for stage in network.up]
    return draw_stages(down, describe(network.middle), up)


BLOCK_NAMES = {
    "ResidualBlock": "residual",
    "SpatialTransformer": "attention",
    "Downsample": "downsample",
    "Upsample": "upsample",
}


def draw_stages(down: list[str], middle: str, up: list[str]):
    """The stages of a UNet: the way down at the left, the way up at the right."""
    step = 1.3
    top = step * len(down) + 1.0
    d = Diagram(19, top + 1.2)
    left = [d.box(3.6, top - step * k, text, NETWORK, 5.6) for k, text in enumerate(down)]
    bottom = d.box(9.5, 0.8, middle, NETWORK, 6.4)
    right = [
        d.box(15.4, top - step * (len(up) - 1 - k), text, NETWORK, 6.4)
        for k, text in enumerate(up)
    ]
    for stages in (left, right):
        for a, b in zip(stages, stages[1:]):
            d.arrow(a, b)
    d.arrow(left[-1], bottom)
    d.arrow(bottom, right[0])
    for a, b in zip(left, reversed(right)):
        d.arrow(a, b, color="#cc6633")
    d.text(9.3, top + 0.35, "skip connections: concatenated with the input", 7, color="#cc6633")
    return d.figure


def draw_cross_attention():
    """How the token embeddings of a caption reach the positions of an image."""
    d = Diagram(18, 6)
    image = d.box(2, 4.6, "features of the image\n[B, H·W, C]", DATA, 3.4)
    text = d.box(2, 1.4, "context: token embeddings\n[B, L, D]", DATA, 3.6)
    query = d.box(6.6, 4.6, "Q = x W_Q\n[B, H·W, d]", NETWORK)
    key = d.box(6.6, 2.2, "K = context W_K\n[B, L, d]", NETWORK, 3.0)
    value = d.box(6.6, 0.7, "V = context W_V\n[B, L, d]", NETWORK, 3.0)
    weights = d.box(11.4, 3.6, "softmax(Q Kᵀ / √d)\n[B, H·W, L]", FIXED, 3.6)
    mixed = d.box(15.6, 2.2, "weights · V\n[B, H·W, d]", FIXED, 2.8)
    result = d.box(15.6, 4.9, "added to x\n[B, H·W, C]", RESULT, 2.8)
    d.arrow(image, query)
    d.arrow(text, key)
    d.arrow(text, value)
    d.arrow(query, weights)
    d.arrow(key, weights)
    d.arrow(weights, mixed)
    d.arrow(value, mixed)
    d.arrow(mixed, result, "W_O", offset=(0.5, 0))
    d.text(11.4, 5.2, "one row for each position,\none column for each character", size=7)
    d.text(11.4, 2.55, "padding: weight 0 by the mask", size=7)
    return d.figure


def draw_guidance():
    """Classifier-free guidance: eps_uncond + scale · (eps_cond - eps_uncond)."""
    d = Diagram(16, 5)
    x_t, uncond, cond = (1.2, 0.8), (4.5, 2.8), (7.0, 2.2)

    def at(scale):
        return tuple(u + scale * (c - u) for u, c in zip(uncond, cond))

    d.arrow(x_t, uncond, color="#888888")
    d.arrow(x_t, cond, color="#3377bb")
    d.arrow(x_t, at(3), color="#cc3333")
    d.axes.plot(*zip(uncond, at(4)), color="#999999", linestyle=":", zorder=0)
    for scale in (0, 1, 2, 3, 4):
        d.axes.plot(*at(scale), "o", color="#333333", markersize=4)
        d.text(at(scale)[0] + 0.1, at(scale)[1] + 0.35, f"scale {scale}", size=7)
    d.text(x_t[0] - 0.3, x_t[1] - 0.1, "$x_t$")
    d.text(3.2, 3.5, "without the caption:\n$ε_{uncond}$", size=8, color="#666666")
    d.text(7.6, 3.4, "with the caption: $ε_{cond}$", size=8, color="#3377bb")
    d.text(11.8, 3.4, "scale > 1 goes further in the direction\nthat the caption adds",
           size=8, color="#cc3333")
    return d.figure


def draw_repaint():
    """One step of RePaint: the known region is replaced at the noise level of the step."""
    d = Diagram(19, 6.0)
    x_t = d.box(1.6, 3.6, "$x_t$", DATA, 1.8)
    step = d.box(5.4, 4.9, "step of the sampler\nwith the network", NETWORK, 3.4)
    known = d.box(5.4, 2.3, "known image $x_0$\n$α_s x_0 + σ_s ε$", DATA, 3.4)
    inside = d.box(9.8, 4.9, "where the mask is True", FIXED, 3.4)
    outside = d.box(9.8, 2.3, "where it is False", FIXED, 3.4)
    x_s = d.box(14, 3.6, "$x_s$, less noise", RESULT, 2.8)
    d.arrow(x_t, step)
    d.arrow(step, inside)
    d.arrow(known, outside)
    d.arrow(inside, x_s)
    d.arrow(outside, x_s)
    d.text(17.2, 3.6, "next step", size=8)
    d.arrow(x_s, (16.4, 3.6))
    d.arrow((14, 3.05), (1.6, 3.15), "resampling: noise is added again",
            bend=-0.43, color="#cc6633", offset=(0, -1.9))
    return d.figure


def draw_controlnet(controlnet, size: int, context=None, mask=None):
    """A frozen UNet (left) and its ControlNet (right), with the shapes for an image of `size`.

    controlnet: ControlNet. context, mask: [1, L, D] and [1, L] if the network needs them.
    """
    import torch

    device = controlnet.conv_in.weight.device
    x = torch.zeros(1, controlnet.settings["in_channels"], size, size, device=device)
    side = controlnet.factor * size
    control = torch.zeros(1, controlnet.control_channels, side, side, device=device)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        residuals = controlnet(x, t, control, context, mask)

    step = 1.3
    rows = len(residuals)
    d = Diagram(20, step * rows + 1.6)
    stages = ["first convolution", *(f"stage {i} of the way down" for i in range(1, rows - 1))]
    stages.append("middle")
    top = step * rows - 0.4
    noisy = d.box(4.4, top + 1.2, f"$x_t$\n{list(x.shape[1:])}", DATA, 3.0)
    hint = d.box(12.6, top + 1.2, "hint encoder,\nlast layer zero", RESULT, 3.2)
    image = d.box(17.4, top + 1.2, f"control\n{list(control.shape[1:])}", DATA, 3.0)
    d.arrow(image, hint)
    above = noisy, hint
    for row, (stage, residual) in enumerate(zip(stages, residuals)):
        y = top - step * row - 0.2
        frozen = d.box(4.4, y, f"{stage}\nfrozen", FIXED, 4.2)
        copied = d.box(12.6, y, f"{stage}\ncopied, trained", NETWORK, 4.2)
        zero = d.box(8.5, y, "zero\nconvolution", RESULT, 2.0)
        d.arrow(copied, zero, color="#cc6633")
        d.arrow(zero, frozen, color="#cc6633")
        d.text(17.4, y, f"residual {list(residual.shape[1:])}", size=7, color="#cc6633")
        for start, end in zip(above, (frozen, copied)):
            d.arrow(start, end)
        above = frozen, copied
    d.arrow(noisy, (12.6 - 2.1, top), color="#888888")
    return d.figure


def draw_video_unet(network, size: int, frames: int):
    """A stage of a UNet of films, and the motion module behind it, with the shapes of a film.

    network: VideoUNet. size: height and width of the frames.
    """
    channels, side = network.channels[0], size // network.patch
    images = f"[B·{frames}, {channels}, {side}, {side}]"
    d = Diagram(20, 6.2)
    film = d.box(1.9, 5.5, f"film $x_t$\n[B, {network.settings['in_channels']}, {frames}, "
                 f"{size}, {size}]", DATA, 3.2)
    flat = d.box(6.2, 5.5, f"frames as a batch\n{images}", FIXED, 3.8)
    stage = d.box(10.8, 5.5, "stage of the UNet\nsees each frame alone", NETWORK, 3.6)
    motion = d.box(15.2, 5.5, "motion module", RESULT, 3.0)
    following = d.box(18.6, 5.5, "next stage", NETWORK, 2.2)
    for a, b in ((film, flat), (flat, stage), (stage, motion), (motion, following)):
        d.arrow(a, b)

    h = d.box(1.9, 2.6, f"h\n{images}", DATA, 3.2)
    sequences = d.box(6.2, 2.6, f"one sequence a position\n[B·{side}·{side}, {frames}, "
                      f"{channels}]", FIXED, 3.8)
    attention = d.box(10.8, 2.6, "attention of the frames,\nwith their positions", RESULT, 3.6)
    forward = d.box(14.9, 2.6, "feed-forward", RESULT, 2.6)
    zero = d.box(18.2, 2.6, "zero layer", RESULT, 2.4)
    for a, b in ((h, sequences), (sequences, attention), (attention, forward), (forward, zero)):
        d.arrow(a, b)
    d.arrow((1.9, 2.1), (18.2, 2.1), "h is added", bend=0.12, color="#cc6633", offset=(0, -1.3))
    d.arrow((13.8, 5.0), (1.9, 3.1), color="#999999")
    d.arrow((16.6, 5.0), (19.3, 3.1), color="#999999")
    return d.figure
