"""Photographs of dishes in a store: python -m datasets.aipos_lmdb PHOTOS STORE --size 128

Decoding and scaling a photograph takes ten times as long as reading it when it is small already; so it is done once. What PHOTOS may be
says aipos.py. Interrupted, it goes on where it was. The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it, aipos.py and
lmdb_store.py.

>>> import tempfile, pathlib
>>> from PIL import Image
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> (folder / "photos" / "番茄汤").mkdir(parents=True)
>>> Image.new("RGB", (90, 60), "red").save(folder / "photos" / "番茄汤" / "1.jpg")
>>> build(folder / "photos", folder / "store", size=32, show_progress=False)
(1, {})
>>> picture, name = AiposFoodLmdb(folder / "store")[0]
>>> tuple(picture.shape), name
((3, 32, 32), '番茄汤')
"""

import argparse
from functools import partial

import torch

from .aipos import list_photos, load_photo
from .lmdb_store import ImageCaptionStore, store_files


class AiposFoodLmdb(ImageCaptionStore):
    """Item i of a store is (picture uint8 [3, size, size], dish name). flip: half of the time mirrored."""

    def __init__(self, folder, flip: bool = False):
        super().__init__(folder)
        self.flip = flip

    def __getitem__(self, index):
        picture, name = super().__getitem__(index)
        return picture.flip(2) if self.flip and torch.rand(()) < 0.5 else picture, name


def build_store(photos, store, size: int = 128, show_progress: bool = True) -> tuple[int, dict[str, str]]:
    """Write a folder of photographs into a store. Returns how many it holds and, for each file that was skipped, why."""
    rows = [(file.relative_to(photos).as_posix(), name, file) for file, name in list_photos(photos)]
    if not rows:
        raise FileNotFoundError(f"no picture in {photos}: it should hold a folder for each dish name, with pictures inside")
    return store_files(store, rows, partial(load_photo, size=size), {"size": size}, show_progress)


def main(arguments=None):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m datasets.aipos_lmdb", description=__doc__.splitlines()[0])
    parser.add_argument("photos", help="a folder for each dish name, photographs inside; or HowToCook's folder")
    parser.add_argument("store", help="where the store goes; if it is there, it is continued")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        count, skipped = build_store(options.photos, options.store, options.size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for file, reason in skipped.items():
        print(f"skipped {file}: {reason}")
    print(f"{count} pictures in {options.store}, {len(skipped)} files skipped")


if __name__ == "__main__":
    main()
