"""Several views of each photograph, in an LMDB store: random crops beside the middle.

A few hundred photographs are soon memorised. Each is therefore stored several times: view 0 is the
largest square in its middle; the others are random squares of 80 to 100% of the shorter side.
Mirrored images are not stored: the loader of an autoencoder mirrors at random, and `encode_store`
in latents_lmdb.py writes the latents of both.

A photograph belongs to the training or to the test split by a hash of its content, see aipos.py,
and so do all of its views.

The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it, aipos.py, lmdb_environment.py and
lmdb_store.py.

>>> import tempfile
>>> from pathlib import Path
>>> from PIL import Image
>>> folder = Path(tempfile.mkdtemp())
>>> (folder / "番茄汤").mkdir()
>>> Image.new("RGB", (90, 60), "red").save(folder / "番茄汤" / "1.jpg")
>>> dataset = PhotoViews(AiposFood(folder, size=32), views=3)
>>> image, caption = dataset[2]
>>> len(dataset), tuple(image.shape), caption
(3, (3, 32, 32), '番茄汤')
"""

import os

import torch
from tqdm.auto import tqdm

from .aipos import AiposFood, load_photo
from .lmdb_environment import recover
from .lmdb_store import ImageCaptionStore, append_records, count_records

SMALLEST_CROP = 0.8  # side of the smallest square, as a fraction of the photograph's shorter side


class PhotoViews(torch.utils.data.Dataset):
    """Item i is (image uint8 [3, size, size], dish name): view i // n of photograph i % n.

    photos: an AiposFood of n photographs, whose files, captions and size are used
    views: number of views of each photograph, 1 or more; else ValueError

    The same index always gives the same view.
    """

    def __init__(self, photos: AiposFood, views: int = 5):
        if views < 1:
            raise ValueError(f"views must be 1 or more, not {views}")
        self.photos = photos
        self.views = views

    def __len__(self):
        return len(self.photos) * self.views

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"view {index} of {len(self)}")
        view, photo = divmod(index, len(self.photos))
        file, size = self.photos.files[photo], self.photos.size
        if view == 0:
            pixels = load_photo(file, size)  # [size, size, 3]
        else:
            generator = torch.Generator().manual_seed(index)
            fraction, x, y, *centering = torch.rand(5, generator=generator).tolist()
            side = round(size / (SMALLEST_CROP + (1 - SMALLEST_CROP) * fraction))
            square = load_photo(file, side, centering)  # [side, side, 3]
            left, top = int(x * (side - size + 1)), int(y * (side - size + 1))
            pixels = square[top:top + size, left:left + size]
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # [3, size, size]
        return image, self.photos.captions[photo]


def build_view_store(photos: AiposFood, store, views: int = 5) -> ImageCaptionStore:
    """Write the views of photographs into a store, or those that it lacks; return the store.

    An interrupted call is resumed by the same call. Raises ValueError if the store holds more
    records than there are views, or other photographs.
    """
    dataset = PhotoViews(photos, views)
    recover(store)
    existing = count_records(store)
    if existing:
        stored = ImageCaptionStore(store)
        if existing > len(dataset) or not _is_same(stored[existing - 1], dataset[existing - 1]):
            raise ValueError(
                f"{store} holds other photographs or views: use another folder or remove this one"
            )
    if existing < len(dataset):
        missing = torch.utils.data.Subset(dataset, range(existing, len(dataset)))
        workers = min(8, os.cpu_count() or 1)
        records = torch.utils.data.DataLoader(missing, batch_size=None, num_workers=workers)
        for _ in tqdm(
            append_records(store, records),
            initial=existing,
            total=len(dataset),
            desc="storing photographs",
            unit="view",
        ):
            pass
    return ImageCaptionStore(store)


def _is_same(item, other) -> bool:
    """Whether two (image, caption) are equal."""
    return item[1] == other[1] and torch.equal(item[0], other[0])
