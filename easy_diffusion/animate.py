"""From one picture to a looping film: the camera moves, a painter paints what it uncovers, and the frames become a GIF.

    picture ─ uncover ─ paint ─ uncover ─ paint ─ ...      the pictures that the camera meets on its way
    strip or pyramid of all of them ─ frames                smooth, and as many as wanted: no network is called for a frame

A painter is any function (picture uint8 [H, W, 3], mask bool [H, W]) -> picture, for example RePaint with one's own
model (inpaint.py), or a grey brush. The file needs numpy, Pillow, imageio and, beside it, camera.py.

>>> def paint(picture, mask): return np.where(mask[..., None], np.uint8(200), picture)
>>> film = animate(np.zeros((64, 64, 3), np.uint8), "right", paint, repaints=2, seconds=1, fps=10, size=(128, 128))
>>> len(film), film[0].shape
(10, (128, 128, 3))
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import camera

FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
         "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf", "SimHei.ttf")


def walk(picture: np.ndarray, move: str, paint: Callable, repaints: int = 4, pixels: int | None = None) -> list[np.ndarray]:
    """The picture and the `repaints` pictures that the camera meets after it, each uint8 [H, W, 3].

    pixels: the step of the camera (default: a quarter of the width for "right", an eighth for "zoom-out").
    """
    pixels = pixels or default_step(picture, move)
    pictures = [picture]
    for _ in range(repaints):
        pictures.append(paint(*camera.uncover(pictures[-1], move, pixels)))
    return pictures


def default_step(picture: np.ndarray, move: str) -> int:
    """The camera's step in pixels: a quarter of the width, or an eighth on each side for a zoom."""
    return max(1, picture.shape[1] // (4 if move == "right" else 8))


def animate(picture: np.ndarray, move: str, paint: Callable, repaints: int = 4, seconds: float = 4.0, fps: int = 20,
            size: tuple[int, int] | None = None) -> list[np.ndarray]:
    """The frames of a loop, seconds · fps of them, uint8 [H, W, 3] of `size` (W, H) pixels (default: the picture's)."""
    pictures = walk(picture, move, paint, repaints)
    pixels, frames = default_step(picture, move), max(2, round(seconds * fps))
    size = size or (picture.shape[1], picture.shape[0])
    if move == "right":
        return list(camera.strip_frames(camera.strip(pictures, pixels), picture.shape[1], size, frames))
    return list(camera.pyramid_frames(pictures, pixels, size, frames))


def write_gif(path, frames: list[np.ndarray], fps: int = 20) -> None:
    """A GIF that loops forever; written beside the path and renamed. A GIF counts in hundredths of a second: 20 or 10 frames a
    second are exact, others are rounded."""
    duration = 10 * max(2, round(100 / fps))                                # milliseconds; browsers slow down what is below 20
    write_atomically(path, iio.imwrite("<bytes>", np.stack(frames), extension=".gif", plugin="pillow", duration=duration, loop=0))


def write_atomically(path, data: bytes) -> None:
    """The bytes under a temporary name in the same folder, then renamed: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def chinese_font(pixels: int) -> ImageFont.FreeTypeFont:
    """The first CJK font that is here: the system's, or that of the package mplfonts. Raises OSError, with a hint, if none is."""
    folders = []
    try:
        import mplfonts
        folders = [Path(mplfonts.__file__).parent / "fonts"]
    except ImportError:
        pass
    for name in [*FONTS] + [str(folder / name) for folder in folders for name in FONTS]:
        try:
            return ImageFont.truetype(name, pixels)
        except OSError:
            continue
    raise OSError("no font with Chinese characters: `pip install mplfonts`, or install the system's Noto Sans CJK")


def contact_sheet(rows: list[list[np.ndarray]], captions: list[str], columns: int = 4, side: int = 128) -> Image.Image:
    """Pictures with a name under them. rows[i]: the pictures, uint8 [H, W, 3], that stand side by side over captions[i]."""
    font, gap = chinese_font(max(12, side // 8)), side // 10
    width, height = side * max(len(row) for row in rows) + gap, side + side // 4
    sheet = Image.new("RGB", (columns * width + gap, -(-len(rows) // columns) * height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        x, y = i % columns * width + gap, i // columns * height + gap
        for k, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x + k * side, y))
        pen.text((x + len(row) * side / 2, y + side + 2), caption, fill="black", font=font, anchor="ma")
    return sheet


def write_png(path, image: Image.Image) -> None:
    """A PNG, written beside the path and renamed."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
