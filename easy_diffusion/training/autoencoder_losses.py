"""What an autoencoder is taught: pictures back, sharp, from latents that stay near N(0, I).

    loss = |x - y|  +  w_q (x - y)²  +  w_s structure(x, y)  +  w_p LPIPS(x, y)  +  w_k KL / numbers of x  -  w_a λ D(y)
                                                                                          y = decode(z), z ~ q(z | x)

|x - y| alone counts many small errors as much as a few large ones; its square minds the large ones, which are edges in the wrong place, and
brings 0.4 dB for nothing (code_detail.md), so it is on by default. Both answer doubt with a compromise of what may be, which is blurred.
Three terms object to blur:

    structure      |x - y| again, of the differences between scales (a Laplacian pyramid, Burt & Adelson 1983): an edge at the wrong
                   place or missing costs at each scale. It needs no weights; in trainings of minutes it has gained nothing yet
    LPIPS          the distance between features that VGG16 sees in x and in y (Zhang et al. 2018), where its weights are on disk
    D              a patch discriminator (Isola et al. 2017) that learns to tell x from y, patch by patch, and joins later, when y is
                   good enough to be worth an opinion. λ = |∇ all other terms| / |∇ D(y)| at the decoder's last layer makes its pull
                   as strong as theirs, and w_a is its share of that (Esser et al. 2021, equation 7)

The file needs torch, and torchvision for LPIPS.

>>> x = torch.rand(2, 3, 16, 16) * 2 - 1
>>> structure_loss(x, x).tolist(), PatchDiscriminator(width=32)(x).shape
([0.0, 0.0], torch.Size([2, 1, 4, 4]))
"""


import torch
import torch.nn.functional as F
from torch import nn

from ..networks.weights_io import read_tensors


def laplacian_pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Laplacian pyramid of pictures [B, C, H, W]: `levels` - 1 differences between a scale and the next, [B, C, H / 2^k, W / 2^k], and
    the smallest picture. Each scale is the mean over 2×2 numbers of the one before. ValueError for sides that cannot be halved so often."""
    if x.shape[-2] % 2 ** (levels - 1) or x.shape[-1] % 2 ** (levels - 1):
        raise ValueError(f"for {levels} scales height and width are multiples of {2 ** (levels - 1)}, not {tuple(x.shape[-2:])}")
    parts = []
    for _ in range(levels - 1):
        smaller = F.avg_pool2d(x, 2)
        parts.append(x - F.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False))
        x = smaller
    return [*parts, x]


def structure_loss(x: torch.Tensor, y: torch.Tensor, levels: int = 4) -> torch.Tensor:
    """[B]: the mean absolute difference of two pictures' pyramids, summed over the scales. Sides are multiples of 2^(levels - 1)."""
    return sum((a - b).abs().flatten(1).mean(dim=1) for a, b in zip(laplacian_pyramid(x, levels), laplacian_pyramid(y, levels)))


class PatchDiscriminator(nn.Module):
    """Pictures [B, C, H, W] → for each patch of 26×26 pixels how real it looks, [B, 1, H/4, W/4].

    width: channels of the first layer, a multiple of 32. It normalises over groups of channels of the whole picture, not over the batch, so
    that a picture's answers do not depend on its neighbours.
    """

    def __init__(self, image_channels: int = 3, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False), nn.GroupNorm(32, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False), nn.GroupNorm(32, 4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        return self.layers(x)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The hinge loss of its answers to real and decoded pictures: ½ (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))), a number."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """λ, at most 10⁴: how much stronger the first loss pulls at the decoder's last layer than the second. Both losses are numbers."""
    ours, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    theirs, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(max=1e4).detach()


class LPIPS(nn.Module):
    """Two pictures [B, 3, H, W] in [-1, 1] → how different they look, [B]: squared differences of VGG16's features at five depths, of
    length one at each place, weighed by what people found (Zhang et al. 2018, equation 1). Its weights do not learn.

    vgg: torchvision's vgg16-397923af.pth. linear: LPIPS' own vgg.pth (version 0.1), seven kilobytes. Raises FileNotFoundError, or
    ValueError for a file of something else.
    """

    DEPTHS, CHANNELS = (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)         # the layers relu1_2, 2_2, 3_3, 4_3, 5_3

    def __init__(self, vgg, linear):
        super().__init__()
        from torchvision.models import vgg16
        with torch.device("meta"):                                          # no numbers yet: they come from the file
            features = vgg16(init_weights=False).features[:self.DEPTHS[-1] + 1]
        for i, layer in enumerate(features):
            if isinstance(layer, nn.ReLU):
                features[i] = nn.ReLU()                                     # not in place: what was seen before it stays
        state = {name.removeprefix("features."): tensor for name, tensor in read_tensors(vgg).items() if name.startswith("features.")}
        wanted = {name: tensor.shape for name, tensor in features.state_dict().items()}
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError(f"{vgg} is not torchvision's VGG16: its convolutions are other ones")
        features.load_state_dict(state, assign=True)
        self.features, linear_state = features, read_tensors(linear)
        for depth, channels in enumerate(self.CHANNELS):
            weight = linear_state.get(f"lin{depth}.model.1.weight")
            if weight is None or weight.shape != (1, channels, 1, 1):
                raise ValueError(f"{linear} has no lin{depth}.model.1.weight of {channels} numbers, so it is not LPIPS' for VGG16")
            self.register_buffer(f"weight_{depth}", weight)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))      # ImageNet's, for numbers in [-1, 1]
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def seen(self, x):
        """Features of length one at each place, five of them, [B, C, H / 2^k, W / 2^k]."""
        h, parts = (x - self.mean) / self.deviation, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.DEPTHS:
                parts.append(h / (h.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return parts

    def forward(self, x, y):
        return sum((getattr(self, f"weight_{depth}") * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
                   for depth, (a, b) in enumerate(zip(self.seen(x), self.seen(y))))
