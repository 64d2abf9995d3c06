"""Moving the camera over a picture: what is seen after a small move, and which part of it was never painted.

    right       the camera goes right by m pixels:  x'[i, j] = x[i, j + m];  the last m columns are new
    zoom-out    it goes back, m pixels on each side: x' = x scaled to (H - 2m, W - 2m), in the middle of a new frame

The new part is the mask, True = to be repainted. Repeated, a move paints a long strip or a pyramid of nested pictures, and
`strip_frames` and `pyramid_frames` move smoothly over what was painted: no network is called for a frame. Pictures are
uint8 [H, W, 3]. The file needs numpy and Pillow.

>>> picture, mask = uncover(np.zeros((64, 64, 3), np.uint8), "right", pixels=16)
>>> picture.shape, int(mask[0].sum()), bool(mask[:, -16:].all())
((64, 64, 3), 16, True)
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

MOVES = ("right", "zoom-out")


def uncover(picture: np.ndarray, move: str, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Move the camera: (picture uint8 [H, W, 3], mask bool [H, W]), the unpainted part grey.

    Raises ValueError for an unknown move, a picture of another form, or a step that leaves nothing of the picture.
    """
    if move not in MOVES:
        raise ValueError(f"a move is one of {', '.join(MOVES)}, not {move!r}")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    h, w, _ = picture.shape
    room = w if move == "right" else min(h, w) // 2
    if not 1 <= pixels < room:
        raise ValueError(f"a step {move} over {w}×{h} pixels is 1 to {room - 1}, not {pixels}")
    moved, mask = np.full_like(picture, 127), np.ones((h, w), dtype=bool)
    if move == "right":
        moved[:, :-pixels], mask[:, :-pixels] = picture[:, pixels:], False
    else:
        inner = slice(pixels, h - pixels), slice(pixels, w - pixels)
        small = Image.fromarray(picture).resize((w - 2 * pixels, h - 2 * pixels), Image.Resampling.LANCZOS)
        moved[inner], mask[inner] = np.asarray(small), False
    return moved, mask


def strip(pictures: list[np.ndarray], pixels: int) -> np.ndarray:
    """The views of a camera that went right by `pixels` each time, joined: uint8 [H, W + (n - 1) pixels, 3]."""
    return np.concatenate([pictures[0]] + [picture[:, -pixels:] for picture in pictures[1:]], axis=1)


def strip_frames(long: np.ndarray, width: int, size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """A window of `width` gliding over a long picture, there and back, in `frames` frames of size (W, H)."""
    image, way = Image.fromarray(long), long.shape[1] - width
    for u in there_and_back(frames):
        yield np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=(u * way, 0, u * way + width, long.shape[0])))


def pyramid_frames(pictures: list[np.ndarray], pixels: int, size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """Zooming out over nested pictures, each holding the one before in its middle, and back in; frames of size (W, H).

    At depth z the view lies between pictures k - 1 < z ≤ k. It is cut from the outer one, and the inner one, which is
    sharper, is laid over its middle. Equal steps of depth shrink the view by equal factors.
    """
    images = [Image.fromarray(picture) for picture in pictures]
    w, h = images[0].size
    shrink = np.array([(w - 2 * pixels) / w, (h - 2 * pixels) / h])
    for u in there_and_back(frames):
        z = u * (len(images) - 1)
        k = max(int(np.ceil(z)), 1)
        margin = (1 - shrink ** (k - z)) * (w, h) / 2                       # of the outer picture, outside the view
        frame = images[k].resize(size, Image.Resampling.BICUBIC, box=(*margin, w - margin[0], h - margin[1]))
        inner = np.round(np.array(size) * shrink ** (z - k + 1)).astype(int)
        frame.paste(images[k - 1].resize(tuple(inner), Image.Resampling.BICUBIC), tuple((size - inner) // 2))
        yield np.asarray(frame)


def there_and_back(frames: int) -> np.ndarray:
    """`frames` places from 0 to 1 and back, slow at both ends, the last one just before the first: a loop."""
    return (1 - np.cos(2 * np.pi * np.arange(frames) / frames)) / 2
