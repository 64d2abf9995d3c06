"""Camera moves over an image: the region that a move uncovers, and the frames of the film.

There are ten moves by d pixels, in three groups. Each gives a film that loops:

    up, down, left, right,      The camera pans by d pixels and comes back:
    up-left, up-right,          x'[i, j] = x[i + d·dy, j + d·dx]. It uncovers a strip at the edge
    down-left, down-right       of the image, or an L for the diagonals.

    circle                      The image is scaled down, so that a border of width d around it is
                                uncovered. The camera then moves in a circle over the larger view.

    centre                      A copy of the image, 2d pixels wide, lies in the middle of the
                                image, and a ring of width d around the copy is uncovered. The
                                camera zooms into the copy, which is the image itself (the Droste
                                effect).

The uncovered region is the mask, True = inpaint. It is inpainted once, on a canvas that holds
everything the camera will show. The frames are crops of this canvas at fractional positions and
scales, so that the film is smooth and needs no further inpainting.

Images are uint8 [H, W, 3]; sizes are (W, H), as in Pillow. The file needs numpy and Pillow.

>>> view, mask = uncover(np.zeros((64, 64, 3), np.uint8), "right", pixels=16)
>>> view.shape, int(mask[0].sum()), bool(mask[:, -16:].all())
((64, 64, 3), 16, True)
>>> pan_windows("down-right", pixels=16, steps=1)
[(16, 0), (0, 16), (16, 16)]
"""

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

DIRECTIONS = {                                          # move → (dx, dy)
    "up": (0, -1),
    "down": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
BORDER_MOVES = ("centre", "circle")
MOVES = (*DIRECTIONS, *BORDER_MOVES)

Box = tuple[float, float, float, float]                 # (left, top, right, bottom)

# ---------------------------------------------------------------- what a move uncovers


def check_move(move: str, known=MOVES) -> None:
    """Raise ValueError, with the known moves, if `move` is not one of them."""
    if move not in known:
        raise ValueError(f"move must be one of {', '.join(known)}, not {move!r}")


def check_image(image: np.ndarray) -> tuple[int, int]:
    """Return height and width of an image uint8 [H, W, 3]; raise ValueError for anything else."""
    if getattr(image, "ndim", 0) != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        dtype = getattr(image, "dtype", type(image))
        raise ValueError(f"image must be uint8 [H, W, 3], not {dtype} {list(np.shape(image))}")
    return image.shape[:2]


def uncover(
    image: np.ndarray, move: str, pixels: int, inner_image: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Move the camera by `pixels`; return the new view and the mask of what it uncovers.

    image: uint8 [H, W, 3].
    move: one of MOVES.
    pixels: distance d. For circle and centre it is measured on the shorter side of the image; the
        distance on the longer side keeps the aspect ratio.
    inner_image: for circle and centre, the image that is scaled down, of the same size as `image`;
        by default `image` itself.

    Returns (view uint8 [H, W, 3], mask bool [H, W], True = inpaint); masked pixels are grey, 127.
    Raises ValueError for an unknown move, an image of another shape or dtype, or a distance at
    which nothing of the image stays visible.
    """
    check_move(move)
    h, w = check_image(image)
    if move in DIRECTIONS:
        dx, dy = DIRECTIONS[move]
        limit = min(side for side, step in ((w, dx), (h, dy)) if step)
    elif move == "circle":
        limit = min(h, w) // 2
    else:                                               # centre
        limit = min(h, w) // 4 + 1
    if limit < 2:
        raise ValueError(f"an image of {w}×{h} pixels is too small for {move}")
    if not 1 <= pixels < limit:
        raise ValueError(
            f"{move} over {w}×{h} pixels can go 1 to {limit - 1} pixels, not {pixels}"
        )
    if move in DIRECTIONS:
        return _uncover_strip(image, move, pixels)
    if inner_image is None:
        inner_image = image
    if check_image(inner_image) != (h, w):
        inner_h, inner_w = inner_image.shape[:2]
        raise ValueError(
            f"inner_image must have the outer image's {w}×{h} pixels, not {inner_w}×{inner_h}"
        )
    return _uncover_border(image, move, pixels, inner_image)


def _uncover_strip(image, move, pixels):
    """The eight directions: x'[i, j] = x[i + d·dy, j + d·dx]; masked where x has no such pixel."""
    h, w = image.shape[:2]
    dx, dy = DIRECTIONS[move]
    target = visible_slices(dy * pixels, h), visible_slices(dx * pixels, w)
    source = visible_slices(-dy * pixels, h), visible_slices(-dx * pixels, w)
    view = np.full_like(image, 127)
    mask = np.ones((h, w), dtype=bool)
    view[target] = image[source]
    mask[target] = False
    return view, mask


def _uncover_border(image, move, pixels, inner_image):
    """Circle and centre: a scaled image in the middle of a masked region.

    The region is the whole image for circle, and twice as wide and high as the scaled image for
    centre.
    """
    h, w = image.shape[:2]
    left, top, right, bottom = inner_box((w, h), move, pixels)
    if move == "circle":
        region = slice(0, h), slice(0, w)
    else:
        region = (
            slice(2 * top - h // 2, 2 * bottom - h // 2),
            slice(2 * left - w // 2, 2 * right - w // 2),
        )
    pil_inner = Image.fromarray(inner_image)
    pil_scaled = pil_inner.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    view = image.copy()
    mask = np.zeros((h, w), dtype=bool)
    view[region] = 127
    mask[region] = True
    view[top:bottom, left:right] = np.asarray(pil_scaled)
    mask[top:bottom, left:right] = False
    return view, mask


def visible_slices(step: int, side: int) -> slice:
    """The pixels of a new view, along one side, that were already visible before the step.

    step: signed distance of the camera in pixels. side: length of the side in pixels.
    """
    return slice(max(-step, 0), side - max(step, 0))


def inner_box(size: tuple[int, int], move: str, pixels: int) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of the scaled image in the view of circle or centre.

    size: (W, H) of the view. move: "circle" or "centre", else ValueError.
    pixels: width of the border, see `uncover`.
    """
    check_move(move, BORDER_MOVES)
    w, h = size
    dx, dy = (pixels * side // min(size) for side in size)
    if move == "circle":
        return dx, dy, w - dx, h - dy
    return w // 2 - dx, h // 2 - dy, w // 2 + dx, h // 2 + dy


def pan_windows(move: str, pixels: int, steps: int) -> list[tuple[int, int]]:
    """List the windows to inpaint, in this order, for a pan.

    move: one of DIRECTIONS, else ValueError.
    pixels: distance of a step. steps: number of steps.

    Each window is the (x, y) of its upper left corner, relative to that of the first view. A
    diagonal step needs three windows: one beside, one above or below, and the diagonal one. With
    the diagonal one alone, the camera would show pixels between two steps that no window covers.
    """
    check_move(move, DIRECTIONS)
    dx, dy = DIRECTIONS[move]
    windows = []
    for k in range(steps):
        if dx and dy:
            corners = [(k + 1, k), (k, k + 1), (k + 1, k + 1)]
        else:
            corners = [(k + 1, k + 1)]
        windows += [(i * dx * pixels, j * dy * pixels) for i, j in corners]
    return windows


# ---------------------------------------------------------------- frames


def paste(
    pil_frame: Image.Image,
    layer: Image.Image,
    left: float,
    top: float,
    right: float,
    bottom: float,
) -> None:
    """Resize a layer to a box with fractional edges, and paste it into a frame.

    pil_frame: is changed. Its pixels that the box covers only in part stay as they are.
    layer: what lies outside the frame is cropped.
    left, top, right, bottom: the box, in pixels of the frame.
    """
    # Whole pixels of the frame within the box.
    x0 = max(0, math.ceil(left - 1e-6))
    y0 = max(0, math.ceil(top - 1e-6))
    x1 = min(pil_frame.width, math.floor(right + 1e-6))
    y1 = min(pil_frame.height, math.floor(bottom + 1e-6))
    if x0 >= x1 or y0 >= y1:
        return

    # The part of the layer that they show.
    scale_x = layer.width / (right - left)
    scale_y = layer.height / (bottom - top)
    source = (
        (x0 - left) * scale_x,
        (y0 - top) * scale_y,
        (x1 - left) * scale_x,
        (y1 - top) * scale_y,
    )
    source = tuple(min(max(edge, 0), side) for edge, side in zip(source, layer.size * 2))
    resized = layer.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, source)
    pil_frame.paste(resized, (x0, y0))


def render_view(
    layers: list[tuple[Image.Image, Box]], view: Box, size: tuple[int, int]
) -> np.ndarray:
    """Render what the camera shows as a frame uint8 [H, W, 3].

    layers: images and their boxes in one plane; each covers those before it.
    view: the box that the camera shows; it must lie within the first layer's box, else ValueError.
    size: (W, H) of the frame in pixels.
    """
    pil_frame = Image.new("RGB", size)
    view_left, view_top, view_right, view_bottom = view
    left, top, right, bottom = layers[0][1]
    margins = view_left - left, view_top - top, right - view_right, bottom - view_bottom
    if min(margins) < -1e-6:
        raise ValueError(f"the view {view} is not within the first layer's box {layers[0][1]}")
    scale_x = size[0] / (view_right - view_left)
    scale_y = size[1] / (view_bottom - view_top)
    for layer, (left, top, right, bottom) in layers:
        paste(
            pil_frame,
            layer,
            (left - view_left) * scale_x,
            (top - view_top) * scale_y,
            (right - view_left) * scale_x,
            (bottom - view_top) * scale_y,
        )
    return np.asarray(pil_frame)


def ease_back_and_forth(frames: int) -> np.ndarray:
    """Positions (1 - cos(2πk / frames)) / 2 for k = 0 … frames - 1: from 0 to 1 and back.

    The motion is slow at both ends, and the first frame follows the last: a loop. If `frames` is
    odd, no frame is exactly at 1.
    """
    return (1 - np.cos(2 * np.pi * np.arange(frames) / frames)) / 2


def pan_frames(
    canvas: np.ndarray,
    start: tuple[int, int],
    move: str,
    distance: int,
    window: tuple[int, int],
    size: tuple[int, int],
    frames: int,
) -> Iterator[np.ndarray]:
    """Yield the frames of a pan over the canvas and back.

    canvas: uint8 [H, W, 3].
    start: (x, y) of the first view's upper left corner on the canvas.
    move: one of DIRECTIONS, else ValueError. distance: its length in pixels of the canvas.
    window: (W, H) of the view on the canvas. size: (W, H) of the frames.
    frames: number of frames.
    """
    check_move(move, DIRECTIONS)
    pil_canvas = Image.fromarray(canvas)
    dx, dy = DIRECTIONS[move]
    layers = [(pil_canvas, (0, 0, *pil_canvas.size))]
    for u in ease_back_and_forth(frames):
        x = start[0] + u * distance * dx
        y = start[1] + u * distance * dy
        yield render_view(layers, (x, y, x + window[0], y + window[1]), size)


def circle_frames(
    inner: np.ndarray, outer: np.ndarray, pixels: int, size: tuple[int, int], frames: int
) -> Iterator[np.ndarray]:
    """Yield the frames of a camera that moves on a circle, clockwise from the top.

    inner: the image before `uncover`, uint8 [H, W, 3].
    outer: the inpainted view after `uncover(inner, "circle", pixels)`, of the same size. The frames
        show `inner` in its middle, at full resolution.
    pixels: radius of the circle in pixels of `outer`, on its shorter side.
    size: (W, H) of the frames. frames: number of frames.
    """
    h, w = outer.shape[:2]
    box = inner_box((w, h), "circle", pixels)
    left, top, right, bottom = box
    layers = [(Image.fromarray(outer), (0, 0, w, h)), (Image.fromarray(inner), box)]
    for k in range(frames):
        angle = 2 * math.pi * k / frames
        x = left * math.sin(angle)
        y = -top * math.cos(angle)
        yield render_view(layers, (left + x, top + y, right + x, bottom + y), size)


def zoom_frames(
    images: list[np.ndarray], boxes: list[Box], size: tuple[int, int], frames: int
) -> Iterator[np.ndarray]:
    """Yield the frames of an infinite zoom through nested images.

    images: uint8 [H, W, 3], all of one size.
    boxes: boxes[i] is where image i + 1 lies in image i. Image 0 follows the last one.
    size: (W, H) of the frames. frames: number of frames.

    The zoom has constant speed: the view shrinks by the same factor from frame to frame, about the
    point that does not move. Each frame shows the images nested in one another, until one is
    narrower than two pixels.
    """
    h, w = images[0].shape[:2]
    pil_images = [Image.fromarray(image) for image in images]

    # The view has depth depths[i] = -log(its scale) where it shows exactly image i.
    ratios = [(right - left) / w for left, _, right, _ in boxes]
    depths = np.cumsum([0.0] + [-math.log(ratio) for ratio in ratios])      # [len(images) + 1]

    for k in range(frames):
        # At this depth the view lies between image i and image i + 1, a fraction u of the way.
        depth = depths[-1] * k / frames
        i = min(int(np.searchsorted(depths, depth, side="right")) - 1, len(images) - 1)
        u = (depth - depths[i]) / (depths[i + 1] - depths[i])
        left, top, right, bottom = boxes[i]
        view_left, view_right = _zoom_interval(w, left, right, u)
        view_top, view_bottom = _zoom_interval(h, top, bottom, u)

        # Image i, and on top of it the images nested in it, in the coordinates of image i.
        box = (0, 0, w, h)
        layers = [(pil_images[i], box)]
        view_width = view_right - view_left
        j = i
        while (box[2] - box[0]) * size[0] >= 2 * view_width:            # two pixels of the frame
            box = _nest(boxes[j % len(images)], box, (w, h))
            j += 1
            layers.append((pil_images[j % len(images)], box))
        yield render_view(layers, (view_left, view_top, view_right, view_bottom), size)


def _zoom_interval(side, low, high, u):
    """The interval that is visible a fraction u of the way from [0, side] to [low, high].

    Its length is side · ((high - low) / side)^u. The point p that does not move divides both
    intervals in the same ratio: p / side = (p - low) / (high - low).
    """
    length = side * ((high - low) / side) ** u
    fixed_point = low / (side - (high - low)) * side
    start = fixed_point * (1 - length / side)
    return start, start + length


def _nest(box, outer, size):
    """Convert a box in an image of this size to the plane where the image fills the box `outer`."""
    left, top, right, bottom = box
    outer_left, outer_top, outer_right, outer_bottom = outer
    scale_x = (outer_right - outer_left) / size[0]
    scale_y = (outer_bottom - outer_top) / size[1]
    return (
        outer_left + left * scale_x,
        outer_top + top * scale_y,
        outer_left + right * scale_x,
        outer_top + bottom * scale_y,
    )
