"""From an image to a looping film: the camera moves, and an inpainter fills what it uncovers.

    name ─ generate ─▶ image                            with a model; or start from a photograph
    image ─ uncover ─ inpaint ─ uncover ─ … ─▶ canvas   each region is inpainted once
    canvas ─▶ frames ─▶ file                            GIF, WebP or MP4

The frames are crops of the canvas (camera.py), so that their number does not change how often the
inpainter is called. Every film loops: its first frame follows its last one.

An inpainter is a function (image uint8 [H, W, 3], mask bool [H, W], True = inpaint) → image of the
same size: RePaint with one's own model, Stable Diffusion, or one line of numpy as in the example
below.

The file needs numpy, Pillow and imageio with imageio-ffmpeg, camera.py beside it, and files.py and
images.py.

>>> def inpaint(image, mask):
...     return np.where(mask[..., None], np.uint8(200), image)
>>> image = np.zeros((64, 64, 3), np.uint8)
>>> film = animate(image, "right", inpaint, seconds=1, fps=10, size=(128, 128))
>>> len(film), film[0].shape
(10, (128, 128, 3))
"""

import io
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image

from ..files import write_atomically
from ..images import contact_sheet
from .camera import (
    DIRECTIONS,
    check_image,
    check_move,
    circle_frames,
    inner_box,
    pan_frames,
    pan_windows,
    uncover,
    zoom_frames,
)

FORMATS = ("gif", "mp4", "webp")


def animate(
    image: str | np.ndarray,
    move: str,
    inpaint: Callable,
    *,
    inpaint_around: Callable | None = None,
    generate: Callable | None = None,
    inpaintings: int = 1,
    pixels: int | None = None,
    seconds: float = 4.0,
    fps: int = 20,
    size: tuple[int, int] | None = None,
    reverse: bool = False,
) -> list[np.ndarray]:
    """Animate an image: returns seconds · fps frames (at least 2), uint8 [H, W, 3].

    image: uint8 [H, W, 3], or a name, which `generate` turns into an image.
    move: one of camera.MOVES.
    inpaint: inpainter of the regions beside the image and, for centre, within it.
    inpaint_around: inpainter of the border around the image, for circle and centre; by default
        `inpaint`.
    generate: function name → image uint8 [H, W, 3].
    inpaintings: how many times the camera moves on to a region that must be inpainted. For circle
        it is always once.
    pixels: distance of each such move; default `default_pixels`.
    seconds, fps: length of the film, and frames per second.
    size: (W, H) of the frames; default the size of the image.
    reverse: play the film backwards; centre then zooms out instead of in.

    The inpainters are called `inpaintings` times for up, down, left and right, three times as often
    for the diagonals, once for circle, and inpaintings + 1 times for centre.

    Raises ValueError for an unknown move, a name without `generate`, numbers out of range, or an
    image of another shape or dtype.
    """
    check_move(move)
    if isinstance(image, str) and generate is None:
        raise ValueError(f"to animate the name {image!r}, pass `generate`, a function name → image")
    if inpaintings < 1:
        raise ValueError(f"inpaintings must be at least 1, not {inpaintings}")
    if seconds <= 0 or fps <= 0 or (size is not None and min(size) < 1):
        raise ValueError(
            f"seconds, fps and size must be above 0, not {seconds}, {fps} and {size}"
        )
    if isinstance(image, str):
        image = generate(image)
    h, w = check_image(image)
    if pixels is None:
        pixels = default_pixels(move, (w, h))
    size = size or (w, h)
    frames = max(2, round(seconds * fps))
    inpaint_around = inpaint_around or inpaint

    if move in DIRECTIONS:
        canvas, start = inpaint_strip(image, move, inpaint, inpaintings, pixels)
        distance = inpaintings * pixels
        film = pan_frames(canvas, start, move, distance, (w, h), size, frames)
    elif move == "circle":
        view, mask = uncover(image, "circle", pixels)
        film = circle_frames(image, inpaint_around(view, mask), pixels, size, frames)
    else:
        images, boxes = inpaint_nested(image, inpaint, inpaint_around, inpaintings, pixels)
        film = zoom_frames(images, boxes, size, frames)
    film = list(film)
    if reverse:
        return film[:1] + film[:0:-1]                   # the same first frame, the others backwards
    return film


def default_pixels(move: str, size: tuple[int, int]) -> int:
    """Default distance of a move over an image of size (W, H), in pixels.

    It is 7/8 of the side along the direction (of the shorter side for a diagonal), and 1/8 of the
    shorter side for circle and centre.

    A model that was trained on whole dishes in the middle of a table can inpaint a whole second
    dish into 7/8 of the view; the visible 1/8 shows the table. If half of a dish were visible, the
    model would complete it with half of another one.

    Raises ValueError for an unknown move.
    """
    check_move(move)
    if move not in DIRECTIONS:
        return max(1, min(size) // 8)
    sides = [side for side, step in zip(size, DIRECTIONS[move]) if step]
    return max(1, min(sides) * 7 // 8)


def inpaint_strip(
    image: np.ndarray, move: str, inpaint: Callable, inpaintings: int, pixels: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Inpaint all that the camera shows on a pan, window by window (camera.pan_windows).

    Returns the canvas uint8 [H, W, 3] and the (x, y) of the image's upper left corner on it. For a
    diagonal, the two corners of the canvas that the camera never shows stay grey, 127.
    Raises ValueError for a move that is not one of camera.DIRECTIONS, or a wrong distance.
    """
    check_move(move, DIRECTIONS)
    h, w = image.shape[:2]
    uncover(image, move, pixels)                        # raises ValueError for a wrong distance
    dx, dy = DIRECTIONS[move]
    distance = inpaintings * pixels
    x0 = distance if dx < 0 else 0
    y0 = distance if dy < 0 else 0
    canvas = np.full((h + distance * abs(dy), w + distance * abs(dx), 3), 127, np.uint8)
    known = np.zeros(canvas.shape[:2], bool)
    canvas[y0:y0 + h, x0:x0 + w] = image
    known[y0:y0 + h, x0:x0 + w] = True
    for x, y in pan_windows(move, pixels, inpaintings):
        window = slice(y0 + y, y0 + y + h), slice(x0 + x, x0 + x + w)
        canvas[window] = inpaint(canvas[window].copy(), ~known[window])
        known[window] = True
    return canvas, (x0, y0)


def inpaint_nested(
    image: np.ndarray, inpaint: Callable, inpaint_around: Callable, inpaintings: int, pixels: int
) -> tuple[list[np.ndarray], list[tuple]]:
    """Inpaint the nested images of an infinite zoom.

    First the view is widened `inpaintings` times: each view holds the one before it in its middle.
    Then the widest view is placed in the middle of the image, which closes the loop.

    Returns (images, boxes) for camera.zoom_frames: the image with the widest view in its middle;
    that view; the next narrower one; and so on. Each holds the next, the last one holds the image.
    """
    h, w = image.shape[:2]
    views = [image]
    for _ in range(inpaintings):
        view, mask = uncover(views[-1], "circle", pixels)
        views.append(inpaint_around(view, mask))
    closed, mask = uncover(image, "centre", pixels, inner_image=views[-1])
    closed = inpaint(closed, mask)

    images = [closed, *views[:0:-1]]                    # closed, widest view, …, narrowest view
    boxes = [inner_box((w, h), "centre", pixels)]
    boxes += [inner_box((w, h), "circle", pixels)] * inpaintings
    return images, boxes


def mosaic(
    films: list[list[np.ndarray]], captions: list[str], columns: int = 4, side: int = 128
) -> list[np.ndarray]:
    """Arrange films in a grid: one film whose frames are contact sheets (images.contact_sheet).

    films: lists of the same number of frames uint8 [H, W, 3]. captions: one per film.
    Raises ValueError if the films differ in length.
    """
    lengths = [len(film) for film in films]
    if len(set(lengths)) != 1:
        raise ValueError(f"the films of a mosaic must be equally long, not {lengths} frames")
    return [
        np.asarray(contact_sheet([[frame] for frame in frames], captions, columns, side))
        for frames in zip(*films)
    ]


def write_film(path, frames: list[np.ndarray], fps: int = 20, loop: bool = True) -> None:
    """Write a film as .gif, .webp or .mp4, atomically (files.py).

    path: its ending selects the format.
    frames: uint8 [H, W, 3], at least one. Equal successive frames become one longer frame in a GIF
        or WebP.
    fps: frames per second.
    loop: whether a GIF or WebP repeats for ever; the player decides for an MP4.

    Raises ValueError for another ending, no frames or frames of another form, or fps ≤ 0.
    """
    ending = Path(path).suffix.lower()
    if fps <= 0:
        raise ValueError(f"fps must be above 0, not {fps}")
    if not len(frames) or ending[1:] not in FORMATS:
        raise ValueError(
            f"a film needs at least one frame and one of the formats {', '.join(FORMATS)}; "
            f"not {len(frames)} frames in {path}"
        )
    check_frames(frames)
    if ending == ".gif":
        write_gif(path, frames, fps, loop)
    elif ending == ".webp":
        pil_images = [Image.fromarray(frame) for frame in frames]
        duration = round(1000 / fps)                    # milliseconds
        repeats = 0 if loop else 1                      # 0: for ever
        data = _encode_images("WEBP", pil_images, duration=duration, loop=repeats, quality=90)
        write_atomically(path, data)
    else:
        # An MP4 stores one colour for each 2×2 pixels, so an odd side repeats its last row or
        # column.
        h, w = frames[0].shape[:2]
        padding = ((0, 0), (0, h % 2), (0, w % 2), (0, 0))
        data = iio.imwrite(
            "<bytes>",
            np.pad(np.stack(frames), padding, mode="edge"),
            extension=".mp4",
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=2,
        )
        write_atomically(path, data)


def check_frames(frames: list[np.ndarray]) -> None:
    """Raise ValueError, naming the frame, unless all are uint8 [H, W, 3] of one size."""
    for i, frame in enumerate(frames):
        is_image = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3
        if not is_image or frame.shape[2] != 3 or frame.shape != frames[0].shape:
            dtype = getattr(frame, "dtype", type(frame).__name__)
            raise ValueError(
                f"frames must be arrays uint8 [H, W, 3] of one size; frame {i} is {dtype} "
                f"{list(getattr(frame, 'shape', []))}"
            )


def write_gif(path, frames: list[np.ndarray], fps: int = 20, loop: bool = True) -> None:
    """Write a GIF whose frames share one palette of 255 colours, atomically (files.py).

    The palette comes from 65,536 random pixels of all frames, by median cut and k-means. A GIF
    stores durations in hundredths of a second: the frame rates 1, 2, 4, 5, 10, 20, 25 and 50 are
    exact, others are rounded, and faster ones become 50, because browsers slow down faster GIFs.
    """
    pixels = np.stack(frames).reshape(-1, 3)                            # [N, 3]
    indices = np.random.default_rng(0).integers(len(pixels), size=65_536)
    pil_sample = Image.fromarray(pixels[indices].reshape(256, 256, 3))
    pil_palette = pil_sample.quantize(255, Image.Quantize.MEDIANCUT, kmeans=1)
    pil_images = [
        Image.fromarray(frame).quantize(palette=pil_palette, dither=Image.Dither.FLOYDSTEINBERG)
        for frame in frames
    ]
    duration = 10 * max(2, round(100 / fps))                            # milliseconds
    options = {"duration": duration, "palette": bytes(pil_palette.getpalette())}
    if loop:
        options["loop"] = 0                                             # for ever
    write_atomically(path, _encode_images("GIF", pil_images, **options))


def _encode_images(file_format, pil_images, **options):
    """The bytes of an animated image file."""
    buffer = io.BytesIO()
    first, *others = pil_images
    first.save(buffer, file_format, save_all=True, append_images=others, **options)
    return buffer.getvalue()
