"""AiposFood: photographs of dishes, a folder for each dish name.

    food/番茄炒鸡蛋/1.jpg                                 or, as HowToCook has it,     dishes/vegetable_dish/番茄炒鸡蛋/成品.jpg
    food/番茄炒鸡蛋/two.png                                                            dishes/vegetable_dish/番茄炒鸡蛋/步骤1.jpg
    food/土豆牛肉汤/1.jpg                                                              dishes/soup/...

The folder's name is the caption. Of a HowToCook dish, with its photographs of each step, only the finished dish is taken. A photograph is
turned upright (EXIF), cut to a square and scaled. A file that is no picture, or only half of one, is skipped with a warning that names
it. Which files are for training is told by a hash of their content, so that it stays the same when files come, go or change their names.
The file needs Pillow, numpy, torch and tqdm.

>>> import tempfile, pathlib
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> (folder / "番茄汤").mkdir()
>>> Image.new("RGB", (90, 60), "red").save(folder / "番茄汤" / "1.jpg")
>>> picture, name = AiposFood(folder, size=32)[0]
>>> tuple(picture.shape), name
((3, 32, 32), '番茄汤')
"""

import hashlib
import re
import struct
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

# What Pillow and its like raise for a file that is no picture.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, struct.error, EOFError, Image.DecompressionBombError)
MAX_ASPECT_RATIO = 20                                                                # sides of 20 : 1 are no photograph


class AiposFood(torch.utils.data.Dataset):
    """Item i is (picture uint8 [3, size, size], dish name), in the order of the files' names.

    split: "train", or "test" for the share `held_out` of the files, or None for all. crop: "centre", or "random" for another square at
    each access; flip: half of the time mirrored. Both draw from torch's generator. Every file is opened once at the start; `skipped`
    counts those that cannot be read. Raises FileNotFoundError for a folder that is not there or holds no picture that can be read.
    """

    def __init__(self, folder, size: int = 64, split: str | None = None, held_out: float = 0.1, crop: str = "centre", flip: bool = False):
        if split not in (None, "train", "test"):
            raise ValueError(f'split is "train", "test" or None, not {split!r}')
        if crop not in ("centre", "random"):
            raise ValueError(f'crop is "centre" or "random", not {crop!r}')
        self.size, self.crop, self.flip, self.files, self.names, self.skipped = size, crop, flip, [], [], 0
        files = list_photos(folder)
        for file, name in tqdm(files, desc=f"opening {folder}", unit="photograph", delay=2, leave=False):
            try:
                load_photo(file, 32)
                if split is None or (hash_fraction(file) < held_out) == (split == "test"):
                    self.files.append(file)
                    self.names.append(name)
            except UNREADABLE as error:
                self.skipped += 1
                warnings.warn(f"skipped {file}: {error}", stacklevel=2)
        if len(files) > self.skipped and not self.files:
            raise FileNotFoundError(f"of the pictures in {folder} none is in split {split!r} with held_out={held_out}")
        if not self.files:
            raise FileNotFoundError(f"no picture in {folder}: it should hold a folder for each dish name, with pictures inside"
                                    f" ({self.skipped} files could not be read)")

    @property
    def captions(self) -> list[str]:
        """The dish name of each item."""
        return self.names

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        where = torch.rand(2).tolist() if self.crop == "random" else (0.5, 0.5)
        picture = torch.from_numpy(load_photo(self.files[index], self.size, where)).permute(2, 0, 1)
        if self.flip and torch.rand(()) < 0.5:
            picture = picture.flip(2)
        return picture.contiguous(), self.names[index]


def list_photos(folder) -> list[tuple[Path, str]]:
    """(file, dish name) of every picture, sorted; of a HowToCook dish the finished one alone. FileNotFoundError without a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if (folder / "dishes").is_dir():
        folder = folder / "dishes"
    plain = [(file, file.parent.name) for file in folder.glob("*/*") if file.is_file() and file.suffix != ".md"]
    howtocook = [(find_finished_dish(dish), dish.name) for dish in folder.glob("*/*") if dish.is_dir() and any(dish.glob("*.md"))]
    return sorted(plain + [(file, name) for file, name in howtocook if file is not None])


def find_finished_dish(folder: Path) -> Path | None:
    """The photograph of the finished dish, among those of its steps; None where there is none.

    It is the one that is called 成品 (finished) or after the dish; else the one that the recipe shows as such, or first; else the only
    one that has no number or step in its name; else the last."""
    pictures = [file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif")]
    pictures.sort(key=lambda file: [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", file.name)])
    recipe = "\n".join(file.read_text("utf-8", "replace") for file in sorted(folder.glob("*.md")))
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", recipe)               # ![words](place)
    shown = [Path(unquote(place.split()[0])).name for words, place in sorted(shown, key=lambda entry: "成品" not in entry[0])
             if place.strip()]
    rules = [lambda file: "成品" in file.stem, lambda file: file.stem == folder.name, lambda file: file.name in shown[:1],
             lambda file: not re.search(r"\d|步骤|step", file.stem)]
    for rule in rules:
        if found := [file for file in pictures if rule(file)]:
            return found[0]
    return pictures[-1] if pictures else None


def hash_fraction(file) -> float:
    """A number from 0 to 1 that depends on a file's content alone."""
    return int.from_bytes(hashlib.blake2b(Path(file).read_bytes(), digest_size=8).digest(), "big") / 2 ** 64


def load_photo(file, size: int, where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A picture, a file or a stream, upright, a square of it scaled to uint8 [size, size, 3]. where: the square's place from left to right
    and from top to bottom, 0 … 1. Raises OSError for a file that is damaged, ValueError for a strip."""
    with Image.open(file) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"a strip of {image.size[0]}×{image.size[1]} pixels")
        image.draft("RGB", (size, size))                                    # a large JPEG is decoded at a fraction of its size
        try:
            upright = ImageOps.exif_transpose(image)
        except (ValueError, TypeError, KeyError, SyntaxError, struct.error):   # what the camera wrote beside the picture is broken
            upright = image
        if upright.mode.startswith("I;16"):                                 # 16 bits a pixel: the upper eight
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if "A" in upright.getbands() or "transparency" in upright.info:      # what can be looked through stands on white
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.array(ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.LANCZOS, centering=where))
