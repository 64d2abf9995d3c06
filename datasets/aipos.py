"""AiposFood: a dataset of food photographs, one folder per dish; the folder's name is the caption.

"AiposFood" is this project's name for its food photographs, after the author's company AIPOS. Any
folder with this layout can be read:

    food/番茄炒鸡蛋/1.jpg
    food/番茄炒鸡蛋/two.png
    food/土豆牛肉汤/1.jpg

A clone of HowToCook can be read, too. HowToCook (github.com/Anduin2017/HowToCook) is an open
collection of Chinese recipes whose photographs are in the public domain. It has a folder of dishes
per category, and each dish has a recipe and photographs of its steps. Only the photograph of the
finished dish is used:

    HowToCook/dishes/vegetable_dish/番茄炒鸡蛋/番茄炒鸡蛋.md    the recipe
    HowToCook/dishes/vegetable_dish/番茄炒鸡蛋/步骤1.jpg        a step: not used
    HowToCook/dishes/vegetable_dish/番茄炒鸡蛋/成品.jpg         the finished dish: used

Each photograph is rotated upright (EXIF orientation), cropped to a square and resized. A file that
cannot be decoded is skipped with a warning that names it. Whether a file belongs to the training
or the test split depends on a hash of its content, so that it stays in its split when other files
are added or removed, and when it is renamed.

The file needs Pillow, numpy, torch and tqdm.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> (folder / "番茄汤").mkdir()
>>> Image.new("RGB", (90, 60), "red").save(folder / "番茄汤" / "1.jpg")
>>> image, caption = AiposFood(folder, size=32)[0]
>>> tuple(image.shape), caption
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

# The exceptions that Pillow raises for a file that is damaged or not an image.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    struct.error,
    EOFError,
    Image.DecompressionBombError,
)
MAX_ASPECT_RATIO = 20  # longer side : shorter side; a more elongated image is not a photograph
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
# Files and folders that macOS, Windows and network disks (Synology) add.
SYSTEM_NAMES = (
    "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information",
    "@eaDir", "#recycle",
)


class AiposFood(torch.utils.data.Dataset):
    """Item i is (image uint8 [3, size, size], dish name), in the order of the file names.

    folder: one of the two layouts in the module's docstring
    size: side of the images in pixels
    split: "train", "test", or None for all files
    test_fraction: the fraction of the files that belong to the test split, 0 … 1
    crop: "centre", or "random" for a new random square at each access
    flip: mirror the image horizontally with probability 1/2 at each access

    The random crop and flip use torch's global generator. Every file is decoded once at the start;
    `skipped` is the number of files that could not be decoded. Raises FileNotFoundError if the
    folder does not exist or contains no image that can be decoded.
    """

    def __init__(
        self,
        folder,
        size: int = 64,
        split: str | None = None,
        test_fraction: float = 0.1,
        crop: str = "centre",
        flip: bool = False,
    ):
        if split not in (None, "train", "test"):
            raise ValueError(f'split is "train", "test" or None, not {split!r}')
        if crop not in ("centre", "random"):
            raise ValueError(f'crop is "centre" or "random", not {crop!r}')
        self.size = size
        self.crop = crop
        self.flip = flip
        self.files: list[Path] = []
        self.captions: list[str] = []
        self.skipped = 0

        photos = list_photos(folder)
        description = f"opening {Path(folder).name}"
        progress = tqdm(photos, desc=description, unit="photo", delay=2, leave=False)
        for file, dish_name in progress:
            try:
                load_photo(file, 32)  # a test: raises if the file cannot be decoded
                if split is None or choose_split(file, test_fraction) == split:
                    self.files.append(file)
                    self.captions.append(dish_name)
            except DECODE_ERRORS as error:
                self.skipped += 1
                warnings.warn(f"skipped {file}: {error}", stacklevel=2)

        decoded = len(photos) - self.skipped
        if decoded == 0:
            raise FileNotFoundError(
                f"no image in {folder}: it should contain one folder per dish name, with images"
                f" inside ({self.skipped} files could not be decoded)"
            )
        if not self.files:
            raise FileNotFoundError(
                f"no image in {folder} is in split {split!r} with test_fraction={test_fraction}"
            )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        centering = (0.5, 0.5)
        if self.crop == "random":
            centering = torch.rand(2).tolist()
        pixels = load_photo(self.files[index], self.size, centering)  # [size, size, 3]
        image = torch.from_numpy(pixels).permute(2, 0, 1)  # [3, size, size]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image.contiguous(), self.captions[index]


def list_photos(folder) -> list[tuple[Path, str]]:
    """List (file, dish name) for every photograph of a folder, sorted.

    Accepts both layouts of the module's docstring; of a HowToCook dish only the photograph of the
    finished dish is listed. Hidden files and folders are left out. A warning counts the images
    that are left out because they are not directly in the folder of a dish. Raises
    FileNotFoundError if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if (folder / "dishes").is_dir():  # a clone of HowToCook
        folder = folder / "dishes"

    photos = []
    misplaced = [path for path in folder.iterdir() if is_image(path)]
    for path in folder.glob("*/*"):
        if is_hidden(path.parent) or is_hidden(path):
            continue
        if not path.is_dir():
            # A photograph in the folder of a dish; or, in HowToCook, a recipe without photographs,
            # which stands directly in the folder of a category.
            if path.suffix != ".md":
                photos.append((path, path.parent.name))
        elif any(path.glob("*.md")):
            # HowToCook: the folder of a dish, with its recipe, in the folder of a category.
            finished = find_finished_dish(path)
            if finished is not None:
                photos.append((finished, path.name))
        else:
            misplaced += [file for file in path.rglob("*") if is_image(file)]
    if misplaced:
        example = min(misplaced).relative_to(folder)
        warnings.warn(
            f"{len(misplaced)} images, such as {example}, are skipped: an image must be in the"
            f" folder of its dish, one level below {folder}",
            stacklevel=2,
        )
    return sorted(photos)


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is of a program's own, such as .ipynb_checkpoints or __MACOSX."""
    return path.name.startswith(".") or path.name in SYSTEM_NAMES


def is_image(path: Path) -> bool:
    """Whether a path has the name of an image file that is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)


def find_finished_dish(folder: Path) -> Path | None:
    """Find the photograph of the finished dish in the folder of a HowToCook recipe.

    In this order of preference:

    1. the file name contains 成品 (finished dish)
    2. the file has the name of the dish
    3. the recipe shows it with 成品 in the alt text; or, without such an image, shows it first
    4. the file name contains no digit and no word for "step"
    5. the last file

    Returns None if the folder contains no image.
    """
    files = [file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda file: _natural_key(file.name))

    # The images of the recipe, written in Markdown as ![alt text](target).
    recipe = "\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.md")))
    linked = []
    for alt_text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", recipe):
        if target.strip():
            linked.append((alt_text, Path(unquote(target.split()[0])).name))
    linked.sort(key=lambda link: "成品" not in link[0])  # False sorts first
    shown_name = linked[0][1] if linked else None

    candidates = (
        [file for file in files if "成品" in file.stem],
        [file for file in files if file.stem == folder.name],
        [file for file in files if file.name == shown_name],
        [file for file in files if not re.search(r"\d|步骤|step", file.stem)],
        files[-1:],
    )
    for matches in candidates:
        if matches:
            return matches[0]
    return None


def _natural_key(name: str) -> list[tuple]:
    """Sort key that compares the numbers in a name by value: "2.jpg" comes before "10.jpg"."""
    key = []
    for part in re.split(r"(\d+)", name):
        is_number = part.isdecimal()
        key.append((is_number, int(part) if is_number else part))
    return key


def choose_split(file, test_fraction: float) -> str:
    """Return "test" for about `test_fraction` of all files and "train" for the others."""
    return "test" if hash_fraction(file) < test_fraction else "train"


def hash_fraction(file) -> float:
    """Map the content of a file to a pseudo-random value in [0, 1]."""
    digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def load_photo(file, size: int, centering: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Load an image upright, crop it to the largest square and resize that: uint8 [size, size, 3].

    file: a path or a binary stream
    centering: position of the square along the width and along the height, 0 … 1; 0.5 = middle

    Raises OSError for a damaged file, ValueError for an aspect ratio above MAX_ASPECT_RATIO.
    """
    with Image.open(file) as image:
        width, height = image.size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(
                f"the aspect ratio of {width}×{height} pixels is above {MAX_ASPECT_RATIO}:1"
            )
        image.draft("RGB", (size, size))  # decodes a large JPEG at a fraction of its size
        try:
            upright = ImageOps.exif_transpose(image)
        except (ValueError, TypeError, KeyError, SyntaxError, struct.error):  # damaged EXIF data
            upright = image
        square = ImageOps.fit(
            _to_rgb(upright), (size, size), Image.Resampling.LANCZOS, centering=centering
        )
        return np.array(square)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image of integers or floats of more than 8 bits to mode L by the range of its mode.

    Integers are taken for 16 bits, 0 … 65535. Floats are taken for 0 … 1 if none is above 1, else
    for 0 … 255 or, if any is above 255, 0 … 65535. An image of another mode is returned unchanged.
    Raises ValueError for values that are not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)  # [H, W]
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    white = 65535.0
    if image.mode == "F" and values.max() <= 255:
        white = 1.0 if values.max() <= 1 else 255.0
    levels = np.clip(values * (255 / white), 0, 255).round()
    return Image.fromarray(levels.astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparent pixels are composited on white."""
    image = to_eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
