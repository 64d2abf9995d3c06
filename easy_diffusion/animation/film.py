"""From a dish to a looping film: the camera moves, a painter paints what it uncovers, and the frames become a GIF, a WebP or an MP4.

    name ─ draw ─ picture                                  by a model, or from a photograph
    picture ─ uncover ─ paint ─ uncover ─ paint ─ ...      what the camera meets on its way, each part painted once
    canvas or nested pictures ─ frames                     smooth, and as many as wanted: no network is called for a frame

A painter is any function (picture uint8 [H, W, 3], mask bool [H, W]) -> picture, for example RePaint with one's own model (inpaint.py), or
a grey brush. Every film ends where it began. The file needs numpy, Pillow, imageio and, beside it, camera.py.

>>> def inpaint(picture, mask): return np.where(mask[..., None], np.uint8(200), picture)
>>> film = animate(np.zeros((64, 64, 3), np.uint8), "right", inpaint, seconds=1, fps=10, size=(128, 128))
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
from . import camera

FORMATS = ("gif", "mp4", "webp")


def animate(dish: str | np.ndarray, move: str, inpaint: Callable, *, inpaint_around: Callable | None = None, generate: Callable | None = None,
            inpaintings: int = 1, pixels: int | None = None, seconds: float = 4.0, fps: int = 20, size: tuple[int, int] | None = None,
            reverse: bool = False) -> list[np.ndarray]:
    """The frames of a loop, seconds · fps of them, uint8 [H, W, 3] of `size` (W, H) pixels (default: the picture's).

    dish: a picture uint8 [H, W, 3], or a name, of which draw(name) makes one. move: one of camera.MOVES. paint: the painter of what lies
    beside the dish and, for centre, within it; around: of what lies around it (default: the same). inpaintings: how often the camera goes on
    to something unpainted; circle always once. pixels: how far each time (see `default_pixels`). reverse: played backwards; centre then
    rises out of the picture instead of falling into it. The painters are called `inpaintings` times for a straight move, three times as often
    for a slanting one, once for circle, and inpaintings + 1 times for centre, whatever the number of frames. Raises ValueError for an unknown
    move, a name without draw, or a picture of another form.
    """
    if move not in camera.MOVES:
        raise ValueError(f"a move is one of {', '.join(camera.MOVES)}, not {move!r}")
    if isinstance(dish, str) and generate is None:
        raise ValueError(f"to animate the name {dish!r} a function `draw` is needed, from names to pictures")
    if inpaintings < 1:
        raise ValueError(f"the camera goes on once or more often, not {inpaintings} times")
    if seconds <= 0 or fps <= 0 or size is not None and min(size) < 1:
        raise ValueError(f"seconds, fps and the sides of size are more than 0, not {seconds}, {fps} and {size}")
    picture = generate(dish) if isinstance(dish, str) else dish
    h, w = camera.check_image(picture)
    pixels = default_pixels(move, (w, h)) if pixels is None else pixels
    size, frames = size or (w, h), max(2, round(seconds * fps))
    if move in camera.DIRECTIONS:
        canvas, start = inpaint_strip(picture, move, inpaint, inpaintings, pixels)
        film = camera.pan_frames(canvas, start, move, inpaintings * pixels, (w, h), size, frames)
    elif move == "circle":
        film = camera.circle_frames(picture, (inpaint_around or inpaint)(*camera.uncover(picture, move, pixels)), pixels, size, frames)
    else:
        film = camera.zoom_frames(*inpaint_nested(picture, inpaint, inpaint_around or inpaint, inpaintings, pixels), size, frames)
    film = list(film)
    return film[:1] + film[:0:-1] if reverse else film


def default_pixels(move: str, size: tuple[int, int]) -> int:
    """How far the camera goes at a time: seven eighths of the side that it goes along, or an eighth for circle and centre.

    Seven eighths, because a model that has learned whole dishes in the middle of a table can then paint a whole one beside the first, and
    what is left in view is table enough to go on with; of half a dish it would make another half, of something else."""
    if move not in camera.DIRECTIONS:
        return max(1, min(size) // 8)
    return max(1, min(side for side, way in zip(size, camera.DIRECTIONS[move]) if way) * 7 // 8)


def inpaint_strip(picture: np.ndarray, move: str, inpaint: Callable, inpaintings: int, pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """All that the camera sees on its way, painted window by window: the canvas uint8, and the (x, y) of the picture's corner in it.

    Of a slanting way the two corners that it never sees stay grey, 127."""
    h, w = picture.shape[:2]
    camera.uncover(picture, move, pixels)                                   # raises for what is no step
    (dx, dy), far = camera.DIRECTIONS[move], inpaintings * pixels
    x0, y0 = far * (dx < 0), far * (dy < 0)
    canvas = np.full((h + far * abs(dy), w + far * abs(dx), 3), 127, np.uint8)
    known = np.zeros(canvas.shape[:2], bool)
    canvas[y0:y0 + h, x0:x0 + w], known[y0:y0 + h, x0:x0 + w] = picture, True
    for x, y in camera.pan_windows(move, pixels, inpaintings):
        window = slice(y0 + y, y0 + y + h), slice(x0 + x, x0 + x + w)
        canvas[window] = inpaint(canvas[window].copy(), ~known[window])
        known[window] = True
    return canvas, (x0, y0)


def inpaint_nested(picture: np.ndarray, inpaint: Callable, inpaint_around: Callable, inpaintings: int,
                 pixels: int) -> tuple[list[np.ndarray], list[tuple]]:
    """Nested pictures without end, the dish's first: it, with the widest view around it in its own middle; that view, with the next
    narrower one in its middle; and so on until the dish again. Also the box of each one's inner picture, for camera.zoom_frames."""
    size, views = picture.shape[1::-1], [picture]
    for _ in range(inpaintings):
        views.append(inpaint_around(*camera.uncover(views[-1], "circle", pixels)))
    closed = inpaint(*camera.uncover(picture, "centre", pixels, inside=views[-1]))
    return [closed, *views[:0:-1]], [camera.inner_box(size, "centre", pixels)] + [camera.inner_box(size, "circle", pixels)] * inpaintings


def mosaic(films: list[list[np.ndarray]], captions: list[str], columns: int = 4, side: int = 128) -> list[np.ndarray]:
    """Films of as many frames side by side as one, each with its caption under it."""
    if len({len(film) for film in films}) != 1:
        raise ValueError(f"films of a mosaic are equally long, not of {[len(film) for film in films]} frames")
    return [np.asarray(contact_sheet([[frame] for frame in frames], captions, columns, side)) for frames in zip(*films)]


def write_film(path, frames: list[np.ndarray], fps: int = 20, loop: bool = True) -> None:
    """A film as .gif, .webp or .mp4, by the path's ending; written beside the path and renamed. loop: for ever, or once; an MP4 does not
    say, its player does. Equal neighbours are stored once in a GIF or WebP, and shown for as long as both. ValueError for another ending,
    no frames, or an fps that is no rate."""
    ending = Path(path).suffix.lower()
    if fps <= 0:
        raise ValueError(f"fps is more than 0, not {fps}")
    if not len(frames) or ending[1:] not in FORMATS:
        raise ValueError(f"a film is of one frame or more, and a {', '.join(FORMATS)}; not {len(frames)} frames in {path}")
    if ending == ".gif":
        write_gif(path, frames, fps, loop)
    elif ending == ".webp":
        images = [Image.fromarray(frame) for frame in frames]
        write_atomically(path, _encode_images("WEBP", images, duration=round(1000 / fps), loop=0 if loop else 1, quality=90))
    else:   # an MP4 keeps colours for squares of 2×2 pixels, so an odd side repeats its last row
        h, w = frames[0].shape[:2]
        frames = np.pad(np.stack(frames), ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        write_atomically(path, iio.imwrite("<bytes>", frames, extension=".mp4", plugin="FFMPEG", fps=fps, codec="libx264", quality=8,
                                           macro_block_size=2))


def write_gif(path, frames: list[np.ndarray], fps: int = 20, loop: bool = True) -> None:
    """A GIF whose frames share one palette of 255 colours, found by median cut and k-means in 65,536 pixels of all of them; written beside
    the path and renamed. It plays for ever, or once. A GIF counts in hundredths of a second: frame rates up to 50 that divide 100 are
    exact, others are rounded, and above 50 browsers slow down."""
    pixels = np.stack(frames).reshape(-1, 3)
    some = pixels[np.random.default_rng(0).integers(len(pixels), size=65_536)].reshape(256, 256, 3)         # to find the palette from
    palette = Image.fromarray(some).quantize(255, Image.Quantize.MEDIANCUT, kmeans=1)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    duration = 10 * max(2, round(100 / fps))                                # milliseconds
    write_atomically(path, _encode_images("GIF", images, duration=duration, palette=bytes(palette.getpalette()), **({"loop": 0} if loop else {})))


def _encode_images(kind, images, **options):
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], **options)
    return buffer.getvalue()
