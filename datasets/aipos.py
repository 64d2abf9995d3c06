"""AiposFood: photographs of dishes, a folder for each dish name.

    food/番茄炒鸡蛋/1.jpg
    food/番茄炒鸡蛋/two.png
    food/土豆牛肉汤/1.jpg

The folder's name is the caption; the photograph is turned upright (EXIF), cut to a square around its middle and scaled. A
file that is no picture, or only half of one, is skipped with a warning that names it. The file needs Pillow, numpy and torch.

>>> import tempfile, pathlib
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> (folder / "番茄汤").mkdir()
>>> Image.new("RGB", (90, 60), "red").save(folder / "番茄汤" / "1.jpg")
>>> picture, name = AiposFood(folder, size=32)[0]
>>> tuple(picture.shape), name
((3, 32, 32), '番茄汤')
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


class AiposFood(torch.utils.data.Dataset):
    """Item i is (picture uint8 [3, size, size], dish name), in the order of the files' names.

    Every file is opened once at the start; `skipped` counts those that cannot be read. Raises FileNotFoundError for a
    folder that is not there or holds no picture that can be read.
    """

    def __init__(self, folder, size: int = 64):
        self.size, self.files, self.skipped = size, [], 0
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        for file in sorted(file for file in Path(folder).glob("*/*") if file.is_file()):
            try:
                photograph(file, 32)
                self.files.append(file)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                self.skipped += 1
                warnings.warn(f"skipped {file}: {error}", stacklevel=2)
        if not self.files:
            raise FileNotFoundError(f"no picture in {folder}: it should hold a folder for each dish name, with pictures inside"
                                    f" ({self.skipped} files could not be read)")

    @property
    def captions(self) -> list[str]:
        """The dish name of each item."""
        return [file.parent.name for file in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        file = self.files[index]
        return torch.from_numpy(photograph(file, self.size)).permute(2, 0, 1).contiguous(), file.parent.name


def photograph(file, size: int) -> np.ndarray:
    """A picture file upright, its middle square scaled to uint8 [size, size, 3]. Raises OSError for one that is damaged."""
    with Image.open(file) as image:
        image.draft("RGB", (size, size))                                    # a large JPEG is decoded at a fraction of its size
        upright = ImageOps.exif_transpose(image)
        return np.array(ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
