"""Moving the camera over a picture: what is seen after a move, which part of it was never painted, and the frames of a film.

Ten moves, in three kinds of loop:

    up, down, left, right, and     the camera goes d pixels that way and comes back: x'[i, j] = x[i + d·dy, j + d·dx]. New is what comes in
    up-left … down-right           at the rim: a strip, or an L
    circle                         the picture shrinks by d pixels on each side (of a square), so that a frame around it is new; over what
                                   is painted there the camera goes round, and arrives where it began
    centre                         a small copy of the picture, 2d pixels wide, lies in its own middle, and a ring of width d around it is
                                   new, so that the two grow together. The camera falls into the copy, which is the picture: no end

The new part is the mask, True = to be repainted. It is painted once, on a canvas that holds all that the camera will see; the frames are
cut from that, at places and scales that are no whole numbers, so that the film is smooth however few parts were painted. Pictures are
uint8 [H, W, 3]; sizes are (W, H), as in Pillow. The file needs numpy and Pillow.

>>> picture, mask = uncover(np.zeros((64, 64, 3), np.uint8), "right", pixels=16)
>>> picture.shape, int(mask[0].sum()), bool(mask[:, -16:].all())
((64, 64, 3), 16, True)
>>> windows("down-right", pixels=16, steps=1)
[(16, 0), (0, 16), (16, 16)]
"""

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

DIRECTIONS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0),                              # (dx, dy)
              "up-left": (-1, -1), "up-right": (1, -1), "down-left": (-1, 1), "down-right": (1, 1)}
MOVES = (*DIRECTIONS, "centre", "circle")


def uncover(picture: np.ndarray, move: str, pixels: int, inside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Move the camera by d = `pixels`: (picture uint8 [H, W, 3], mask bool [H, W]), the unpainted part grey.

    For circle and centre d counts on the shorter side, and as much more on the longer one as keeps the picture's form. inside: the picture
    that circle or centre scales (default: the same one), of the same size. Raises ValueError for an unknown move, a picture of another
    form, or a distance that leaves nothing of the picture.
    """
    h, w = check_image(picture)
    if move in DIRECTIONS:
        dx, dy = DIRECTIONS[move]
        room = min(side for side, way in ((w, dx), (h, dy)) if way)
    elif move in MOVES:
        room = min(h, w) // 2 if move == "circle" else min(h, w) // 4 + 1
    else:
        raise ValueError(f"a move is one of {', '.join(MOVES)}, not {move!r}")
    if room < 2:
        raise ValueError(f"a picture of {w}×{h} pixels is too small for {move}")
    if not 1 <= pixels < room:
        raise ValueError(f"{move} over {w}×{h} pixels goes 1 to {room - 1} pixels, not {pixels}")
    if move in DIRECTIONS:
        moved, mask = np.full_like(picture, 127), np.ones((h, w), dtype=bool)
        to = visible_slices(dy * pixels, h), visible_slices(dx * pixels, w)
        source = visible_slices(-dy * pixels, h), visible_slices(-dx * pixels, w)
        moved[to], mask[to] = picture[source], False
        return moved, mask
    left, top, right, bottom = inner_box((w, h), move, pixels)
    inside = picture if inside is None else inside
    if check_image(inside) != (h, w):
        raise ValueError(f"the picture inside is {w}×{h} pixels, as the one around it, not {inside.shape[1]}×{inside.shape[0]}")
    small = Image.fromarray(inside).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    if move == "circle":
        moved, mask = np.full_like(picture, 127), np.ones((h, w), dtype=bool)
    else:
        moved, mask = picture.copy(), np.zeros((h, w), dtype=bool)
        ring = slice(2 * top - h // 2, 2 * bottom - h // 2), slice(2 * left - w // 2, 2 * right - w // 2)
        moved[ring], mask[ring] = 127, True
    moved[top:bottom, left:right], mask[top:bottom, left:right] = np.asarray(small), False
    return moved, mask


def visible_slices(step: int, side: int) -> slice:
    """Of a side of so many pixels those that are still in view after a step, where they are seen then."""
    return slice(max(-step, 0), side - max(step, 0))


def check_image(picture: np.ndarray) -> tuple[int, int]:
    """Height and width of a picture uint8 [H, W, 3]; ValueError for anything else."""
    if getattr(picture, "ndim", 0) != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {getattr(picture, 'dtype', type(picture))} {list(np.shape(picture))}")
    return picture.shape[:2]


def inner_box(size: tuple[int, int], move: str, pixels: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): where the scaled picture lies after circle or centre."""
    w, h = size
    dx, dy = (pixels * side // min(size) for side in size)
    return (dx, dy, w - dx, h - dy) if move == "circle" else (w // 2 - dx, h // 2 - dy, w // 2 + dx, h // 2 + dy)


def pan_windows(move: str, pixels: int, steps: int) -> list[tuple[int, int]]:
    """For one of the eight directions, where the views lie that are painted one after the other on a way of `steps` steps: (x, y) of their
    corners from the first view's.

    A slanting way needs three a step: beside, below and both, else the camera would meet a notch between two steps.
    """
    dx, dy = DIRECTIONS[move]
    places = []
    for k in range(steps):
        corners = [(k + 1, k), (k, k + 1), (k + 1, k + 1)] if dx and dy else [(k + 1, k + 1)]
        places += [(i * dx * pixels, j * dy * pixels) for i, j in corners]
    return places


def paste(frame: Image.Image, picture: Image.Image, left: float, top: float, right: float, bottom: float) -> None:
    """Lay a picture over the frame so that it fills this rectangle, whose edges are no whole pixels; what falls outside is cut off."""
    x0, y0 = max(0, math.ceil(left - 1e-6)), max(0, math.ceil(top - 1e-6))
    x1, y1 = min(frame.width, math.floor(right + 1e-6)), min(frame.height, math.floor(bottom + 1e-6))
    if x0 >= x1 or y0 >= y1:
        return
    across, down = picture.width / (right - left), picture.height / (bottom - top)
    box = ((x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down)
    box = tuple(min(max(edge, 0), side) for edge, side in zip(box, picture.size * 2))
    frame.paste(picture.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box), (x0, y0))


def render_view(pictures: list[tuple[Image.Image, tuple]], seen: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The part `seen` = (left, top, right, bottom) of pictures that lie in boxes of one plane, each over those before it, as a frame uint8
    [H, W, 3] of `size`. What is seen lies within the first box."""
    frame = Image.new("RGB", size)
    across, down = size[0] / (seen[2] - seen[0]), size[1] / (seen[3] - seen[1])
    for picture, (left, top, right, bottom) in pictures:
        paste(frame, picture, (left - seen[0]) * across, (top - seen[1]) * down, (right - seen[0]) * across, (bottom - seen[1]) * down)
    return np.asarray(frame)


def pan_frames(canvas: np.ndarray, start: tuple[int, int], move: str, distance: int, window: tuple[int, int], size: tuple[int, int],
               frames: int) -> Iterator[np.ndarray]:
    """A window that glides over the canvas from its corner `start`, `distance` pixels that way, and back; frames of `size`."""
    image, (dx, dy) = Image.fromarray(canvas), DIRECTIONS[move]
    for u in ease_back_and_forth(frames):
        x, y = start[0] + u * distance * dx, start[1] + u * distance * dy
        yield render_view([(image, (0, 0, *image.size))], (x, y, x + window[0], y + window[1]), size)


def circle_frames(inner: np.ndarray, outer: np.ndarray, pixels: int, size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """A window that goes round over `outer`, in whose middle the sharper picture `inner` lies; clockwise, from the top."""
    w, h = outer.shape[1], outer.shape[0]
    box = inner_box((w, h), "circle", pixels)
    pictures = [(Image.fromarray(outer), (0, 0, w, h)), (Image.fromarray(inner), box)]
    for k in range(frames):
        angle = 2 * math.pi * k / frames
        x, y = box[0] * math.sin(angle), -box[1] * math.cos(angle)
        yield render_view(pictures, (box[0] + x, box[1] + y, box[2] + x, box[3] + y), size)


def zoom_frames(pictures: list[np.ndarray], boxes: list[tuple], size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """Falling through nested pictures for ever: picture i + 1 lies in boxes[i] of picture i, and the first one in the last box of the last.

    Equal times shrink what is seen by equal factors, about the point that stays where it is. At depth z, between pictures i ≤ z and i + 1,
    all that lies deeper is laid over picture i, down to the last pixel.
    """
    n, (w, h) = len(pictures), pictures[0].shape[1::-1]
    images = [Image.fromarray(picture) for picture in pictures]
    ratios = [(right - left) / w for left, _, right, _ in boxes]
    depths = np.cumsum([0.0] + [-math.log(ratio) for ratio in ratios])
    for k in range(frames):
        depth = depths[-1] * k / frames
        i = min(int(np.searchsorted(depths, depth, side="right")) - 1, n - 1)
        part = (depth - depths[i]) / (depths[i + 1] - depths[i])
        seen, (left, top, right, bottom) = [], boxes[i]
        for side, low, high in ((w, left, right), (h, top, bottom)):
            length = side * ((high - low) / side) ** part
            fixed = low / (side - (high - low)) * side                      # what stays where it is: low / side is to its left, scaled
            seen.append((fixed * (1 - length / side), fixed * (1 - length / side) + length))
        nested, box, j = [(images[i], (0, 0, w, h))], (0, 0, w, h), i
        while (box[2] - box[0]) * size[0] >= 2 * (seen[0][1] - seen[0][0]):  # two pixels of the frame
            x, y = (box[2] - box[0]) / w, (box[3] - box[1]) / h
            left, top, right, bottom = boxes[j % n]
            box, j = (box[0] + left * x, box[1] + top * y, box[0] + right * x, box[1] + bottom * y), j + 1
            nested.append((images[j % n], box))
        yield render_view(nested, (seen[0][0], seen[1][0], seen[0][1], seen[1][1]), size)


def ease_back_and_forth(frames: int) -> np.ndarray:
    """`frames` places from 0 to 1 and back, slow at both ends, the last one just before the first: a loop. With an odd number of frames it
    turns between two of them, just before 1."""
    return (1 - np.cos(2 * np.pi * np.arange(frames) / frames)) / 2
