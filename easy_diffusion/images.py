"""TODO."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
         "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf", "SimHei.ttf")


def load_chinese_font(pixels: int) -> ImageFont.FreeTypeFont:
    """The first CJK font that is here: the system's, or that of the package mplfonts. Raises OSError, with a hint, if none is."""
    folders = []
    try:
        import mplfonts
        folders = [Path(mplfonts.__file__).parent / "fonts"]
    except ImportError:
        pass
    for name in [*FONTS] + [str(folder / name) for folder in folders for name in FONTS]:
        try:
            return ImageFont.truetype(name, pixels, index=2 if name.endswith("CJK-Regular.ttc") else 0)     # 2: simplified Chinese
        except OSError:
            continue
    raise OSError("no font with Chinese characters: `pip install mplfonts`, or install the system's Noto Sans CJK")


def contact_sheet(rows: list[list[np.ndarray]], captions: list[str], columns: int = 4, side: int = 128) -> Image.Image:
    """Pictures with a name under them. rows[i]: the pictures, uint8 [H, W, 3], that stand side by side over captions[i]."""
    font, gap, columns = load_chinese_font(max(12, side // 8)), side // 10, min(columns, len(rows))
    width, height = side * max(len(row) for row in rows) + gap, side + side // 4
    sheet = Image.new("RGB", (columns * width + gap, -(-len(rows) // columns) * height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        x, y = i % columns * width + gap, i // columns * height + gap
        for k, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x + k * side, y))
        pen.text((x + len(row) * side / 2, y + side + 2), caption, fill="black", font=font, anchor="ma")
    return sheet


def encode_png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Samples [B, 3, H, W] in [-1, 1] → pictures uint8 [B, H, W, 3]; what lies outside is clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
