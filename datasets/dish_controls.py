"""Control images of drawn dishes and of photographs, for a ControlNet.

A control image says where something is, and the caption what it is. Those of drawn dishes are
exact, because they come from the same composition as the image:

    parts      one channel each for the tabletop, the vessel and the two ingredients, 255 inside.
               The ingredients' channels are in random order, so that they do not name them.
    height     the height of the surface, 0 … 255
    edges      where the brightness changes, from the image itself; also for photographs
    sketch     the brightness of 16 squares along each side, for photographs, too

A dataset item is (image, caption, {"control": control}); all images are uint8 [C, H, W].

The file needs numpy and torch and, beside it, dishes.py, dish_scene.py, dish_rendering.py and
dish_shapes.py.

>>> image, caption, extras = ControlledDishes(100, 64, "parts")[0]
>>> tuple(image.shape), tuple(extras["control"].shape)
((3, 64, 64), (4, 64, 64))
"""

import torch
import torch.nn.functional as F

from .dish_scene import PARTS
from .dishes import Dishes, compose

CHANNELS = {"parts": len(PARTS), "height": 1, "edges": 1, "sketch": 1}
MAX_HEIGHT = 0.4                # of the surface of a drawn dish
EDGE = 0.5                      # change of brightness a pixel, in 0 … 1, that is drawn white
SKETCH_SQUARES = 16             # squares of a sketch along each side


def parts_control(parts: torch.Tensor, is_swapped: bool) -> torch.Tensor:
    """One-hot map of parts: uint8 [4, H, W], 0 or 255.

    parts: uint8 [H, W], see Composition in dish_scene.py.
    is_swapped: whether the channels of the two ingredients change places.
    """
    order = [0, 1, 3, 2] if is_swapped else [0, 1, 2, 3]
    return torch.stack([parts == i for i in order]).to(torch.uint8) * 255


def height_control(height: torch.Tensor) -> torch.Tensor:
    """Height map as an image: uint8 [1, H, W]; MAX_HEIGHT and above is 255.

    height: float [H, W], see Composition in dish_scene.py.
    """
    return (height / MAX_HEIGHT * 255).clamp(0, 255).round().to(torch.uint8)[None]


def brightness(image: torch.Tensor) -> torch.Tensor:
    """The brightness of an image uint8 [3, H, W]: float [1, H, W] in 0 … 1 (ITU-R BT.601)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device)
    return torch.einsum("c,chw->hw", weights, image.float() / 255)[None]


def edges_control(image: torch.Tensor) -> torch.Tensor:
    """Edges of an image uint8 [3, H, W] by Sobel's filter: uint8 [1, H, W], white = an edge.

    The value is the length of the gradient of the brightness; EDGE a pixel and above is 255.
    """
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=image.device) / 8
    filters = torch.stack([sobel, sobel.T])[:, None]                        # [2, 1, 3, 3]
    padded = F.pad(brightness(image)[None], (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded, filters)[0]                                 # [2, H, W]
    length = gradient.square().sum(dim=0, keepdim=True).sqrt()
    return (length / EDGE * 255).clamp(0, 255).round().to(torch.uint8)


def sketch_control(image: torch.Tensor) -> torch.Tensor:
    """The brightness of an image uint8 [3, H, W] in squares, 16 along each side: uint8 [1, H, W].

    H and W are at least 16.
    """
    squares = F.adaptive_avg_pool2d(brightness(image)[None], SKETCH_SQUARES)
    enlarged = F.interpolate(squares, image.shape[1:], mode="nearest")[0]
    return (enlarged * 255).round().to(torch.uint8)


def check_kind(kind: str, known=tuple(CHANNELS)) -> None:
    """Raise ValueError, with the known kinds, if `kind` is not one of them."""
    if kind not in known:
        raise ValueError(f"a control is one of {', '.join(known)}, not {kind!r}")


class ControlledDishes(torch.utils.data.Dataset):
    """Item i is (image, caption, {"control": control}): dish i of `Dishes` with a control image.

    kind: one of CHANNELS, else ValueError.
    The other arguments are those of Dishes.
    """

    def __init__(self, length: int, size: int, kind: str, split: str = "train", seed: int = 0):
        check_kind(kind)
        self.dishes = Dishes(length, size, split, seed)
        self.kind = kind

    def __len__(self):
        return len(self.dishes)

    def __getitem__(self, index):
        name, seed = self.dishes.choose(index)
        dish = compose(name, self.dishes.size, seed)
        image = torch.from_numpy(dish.image)
        if self.kind == "parts":
            generator = torch.Generator().manual_seed(seed)
            is_swapped = bool(torch.rand((), generator=generator) < 0.5)
            control = parts_control(torch.from_numpy(dish.parts), is_swapped)
        elif self.kind == "height":
            control = height_control(torch.from_numpy(dish.height))
        else:
            control = image_control(image, self.kind)
        return image, name, {"control": control}


def image_control(image: torch.Tensor, kind: str) -> torch.Tensor:
    """The control that an image uint8 [3, H, W] itself gives: uint8 [1, H, W].

    kind: "edges" or "sketch", else ValueError.
    """
    check_kind(kind, ("edges", "sketch"))
    return edges_control(image) if kind == "edges" else sketch_control(image)


class WithControl(torch.utils.data.Dataset):
    """A dataset of (image uint8 [3, H, W], caption), each with the control of the image itself.

    kind: "edges" or "sketch", else ValueError.
    """

    def __init__(self, dataset, kind: str):
        check_kind(kind, ("edges", "sketch"))
        self.dataset = dataset
        self.kind = kind

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, caption = self.dataset[index]
        return image, caption, {"control": image_control(image, self.kind)}
