"""PNG files, and contact sheets of images with Chinese captions.

    to_uint8        samples x in [-1, 1] → uint8 images: round(127.5 · (x + 1))
    contact_sheet   several images in a grid, with captions
    show_images     the same for a notebook: tensors or arrays → a small image to display
    encode_png      an image → the bytes of a PNG file

Captions in Chinese need a font with Chinese characters; `load_chinese_font` finds one. The file
needs torch, numpy and Pillow.

>>> x = torch.tensor([-1.0, 0.0, 1.0, 1.5]).expand(1, 3, 1, 4)          # one image of 1×4 pixels
>>> images = to_uint8(x)
>>> images[0, 0, :, 0].tolist()
[0, 128, 255, 255]
>>> encode_png(Image.fromarray(images[0]))[1:4]
b'PNG'
"""

import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# File names of fonts with Chinese characters, in order of preference.
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
    "SimHei.ttf",
)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Convert samples [B, 3, H, W] in [-1, 1] to images uint8 [B, H, W, 3].

    Grey samples [B, 1, H, W] become grey images of three equal channels. Values outside [-1, 1] are
    clipped. Raises ValueError for another number of channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images have 3 channels, [B, 3, H, W], or 1; not {list(x.shape)}")
    x = x.float().clamp(-1, 1).expand(-1, 3, -1, -1)
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def load_chinese_font(pixels: int) -> ImageFont.FreeTypeFont:
    """Load the first installed font of FONTS, of the system or of the package mplfonts.

    pixels: font size. Raises OSError if none is installed, and says what to install.
    """
    paths = [*FONTS]
    try:
        import mplfonts

        folder = Path(mplfonts.__file__).parent / "fonts"
        paths += [str(folder / name) for name in FONTS]
    except ImportError:
        pass
    for path in paths:
        # The file of Noto Sans CJK holds one font per language; number 2 is simplified Chinese.
        index = 2 if path.endswith("CJK-Regular.ttc") else 0
        try:
            return ImageFont.truetype(path, pixels, index=index)
        except OSError:
            continue
    raise OSError(
        "no font with Chinese characters is installed: run `pip install mplfonts`, "
        "or install Noto Sans CJK on the system"
    )


def contact_sheet(
    cells: list[list[np.ndarray]],
    captions: list[str] | None,
    columns: int = 4,
    side: int = 128,
) -> Image.Image:
    """Arrange images in a grid of cells with captions.

    cells[i]: images uint8 [H, W, 3], shown side by side above captions[i].
    captions: one for each cell, or None for a sheet without.
    columns: maximum number of cells in a row of the grid.
    side: longer side of each image in pixels.

    Grey images, uint8 [H, W] or [H, W, 1], are shown, too. Raises ValueError for any others.
    """
    for image in itertools.chain(*cells):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in (
            (), (1,), (3,)
        ):
            raise ValueError(
                f"images must be uint8 [H, W, 3] or grey, not {image.dtype} {list(image.shape)}"
            )
    font_size = max(12, side // 8)
    font = load_chinese_font(font_size)
    gap = side // 10
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)                    # rounded up
    cell_width = side * max(len(images) for images in cells) + gap
    cell_height = side + (gap if captions is None else max(side // 4, font_size + 12))

    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    captions = captions or [""] * len(cells)
    for i, (images, caption) in enumerate(zip(cells, captions, strict=True)):
        x = i % columns * cell_width + gap
        y = i // columns * cell_height + gap
        for k, image in enumerate(images):
            image = image.squeeze(2) if image.shape[2:] == (1,) else image
            scale = side / max(image.shape[:2])
            width, height = round(image.shape[1] * scale), round(image.shape[0] * scale)
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            left, top = (side - width) // 2, (side - height) // 2
            sheet.paste(resized, (x + k * side + left, y + top))
        middle = x + len(images) * side / 2
        draw.text((middle, y + side + 2), caption, fill="black", font=font, anchor="ma")
    return sheet


def show_images(images, captions: list[str] | None = None, columns: int = 8, side: int = 96):
    """Arrange images in a grid, as the last line of a notebook's cell: a Pillow image.

    images: one batch or a list of images. Tensors are float [3, H, W] in [-1, 1] or uint8
        [3, H, W]; arrays are uint8 [H, W, 3].
    columns, captions, side: see `contact_sheet`.

    The image has a palette of 256 colours, which makes a notebook a third as large. Three rounds
    of k-means fit the palette to the pixels; without them plain areas are tinted.
    """
    arrays = []
    for image in images:
        if torch.is_tensor(image) and image.is_floating_point():
            image = to_uint8(image[None])[0]
        elif torch.is_tensor(image):
            image = image.permute(1, 2, 0).cpu().numpy()
        arrays.append(np.asarray(image))
    cells = [[image] for image in arrays]
    sheet = contact_sheet(cells, captions, columns, side)
    return sheet.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=3)


def encode_png(pil_image: Image.Image) -> bytes:
    """Encode a Pillow image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    pil_image.save(buffer, "PNG")
    return buffer.getvalue()
