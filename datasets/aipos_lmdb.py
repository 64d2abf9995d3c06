"""Write food photographs into an LMDB store: python -m datasets.aipos_lmdb PHOTOS STORE --size 128

Decoding and resizing a photograph takes ten times as long as reading the small image from a store,
so it is done once. aipos.py describes the layout of the folder PHOTOS; lmdb_store.py describes the
store. If the command is interrupted, run it again: it resumes where it stopped.

The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it, aipos.py, lmdb_environment.py and
lmdb_store.py.

>>> import tempfile
>>> from pathlib import Path
>>> from PIL import Image
>>> folder = Path(tempfile.mkdtemp())
>>> (folder / "photos" / "番茄汤").mkdir(parents=True)
>>> Image.new("RGB", (90, 60), "red").save(folder / "photos" / "番茄汤" / "1.jpg")
>>> count, skipped = build_store(folder / "photos", folder / "store", 32, show_progress=False)
>>> count, skipped  # one photograph is stored, no file is skipped
(1, {})
>>> image, caption = AiposFoodLmdb(folder / "store")[0]
>>> tuple(image.shape), caption
((3, 32, 32), '番茄汤')
"""

import argparse
import sys
from functools import partial

import torch

from .aipos import list_photos, load_photo
from .lmdb_store import ImageCaptionStore, store_files

MAX_SIZE = 4096  # side of a stored image in pixels


class AiposFoodLmdb(ImageCaptionStore):
    """Item i of a store is (image uint8 [3, size, size], dish name).

    folder: a store that `build_store` has written
    flip: mirror the image horizontally with probability 1/2 at each access
    """

    def __init__(self, folder, flip: bool = False):
        super().__init__(folder)
        self.flip = flip

    def __getitem__(self, index):
        image, caption = super().__getitem__(index)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image, caption


def build_store(
    photos, store, size: int = 128, show_progress: bool = True
) -> tuple[int, dict[str, str]]:
    """Write a folder of photographs into a store.

    If the store exists, only the photographs that it lacks are appended, so that a call resumes an
    interrupted one.

    photos: folder of photographs, in a layout that aipos.py describes
    store: folder of the store
    size: side of the stored images in pixels

    Returns the number of records in the store and a dict from each skipped file to the reason.
    Raises FileNotFoundError if `photos` contains no image, ValueError if the images in the store
    have another size.
    """
    samples = []  # (name, caption, source), as `store_files` expects them
    for file, dish_name in list_photos(photos):
        samples.append((file.relative_to(photos).as_posix(), dish_name, file))
    if not samples:
        raise FileNotFoundError(
            f"no image in {photos}: it should contain one folder per dish name, with images inside"
        )
    load_image = partial(load_photo, size=size)
    return store_files(store, samples, load_image, {"size": size}, show_progress)


def main(arguments=None):
    """Run the command; see the module's docstring. Returns 1 if the store has no record."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.aipos_lmdb", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "photos",
        help="folder with one subfolder of photographs per dish name, or a clone of HowToCook",
    )
    parser.add_argument("store", help="folder of the store; new images are appended to it")
    parser.add_argument(
        "--size", type=int, default=128, help="side of the images in pixels (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.size <= MAX_SIZE:
        parser.error(f"--size must be from 1 to {MAX_SIZE}, not {options.size}")
    for stream in (sys.stdout, sys.stderr):  # a console may lack Chinese characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        count, skipped = build_store(options.photos, options.store, options.size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for file, reason in skipped.items():
        print(f"skipped {file}: {reason}")
    print(f"{count} images in {options.store}, {len(skipped)} files skipped")
    return 0 if count else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command resumes where it stopped")
