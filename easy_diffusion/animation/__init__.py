"""Animation: an image becomes a looping film, by camera moves and inpainting.

The files, in reading order:

    camera.py   the ten camera moves: what each shows, what it uncovers, and the frames
    film.py     image → frames → GIF, WebP or MP4

When the folder is copied into another project, it needs files.py and images.py beside it; camera.py
works alone. The packages are numpy, Pillow, imageio with imageio-ffmpeg, and torch (for images.py).
The inpainter is a function that the caller passes in, such as RePaint.
"""

from .camera import DIRECTIONS, MOVES, circle_frames, pan_frames, uncover, zoom_frames
from .film import (
    FORMATS,
    animate,
    default_pixels,
    inpaint_nested,
    inpaint_strip,
    mosaic,
    write_film,
    write_gif,
)

__all__ = [
    "DIRECTIONS",
    "FORMATS",
    "MOVES",
    "animate",
    "circle_frames",
    "default_pixels",
    "inpaint_nested",
    "inpaint_strip",
    "mosaic",
    "pan_frames",
    "uncover",
    "write_film",
    "write_gif",
    "zoom_frames",
]
