"""The latents of a store's images in a second LMDB store: encode once, train often.

An autoencoder maps an image to a normal distribution over latents, N(mean, std²). Encoding an image
costs about as much as a training step of the diffusion network and gives the same distribution each
time. `encode_store` therefore encodes each image of a store once and writes mean and std into a
second store, the latent store. `LatentLmdb` reads it and draws, at each access,

    z = mean + std · eps,    eps ~ N(0, I).

A latent is small: for example 4×16×16 values for an image of 3×128×128.

A latent store is an LMDB file like that of lmdb_store.py, with another layout. A record consists of

    length    4 bytes, little-endian: the length of the header
    header    JSON in UTF-8: {"caption": ..., "shape": [F, 2, C, h, w]}
    values    float16 [F, 2, C, h, w]

The axes of the values are:

    F       views: 1 = the image, 2 = the image and its mirror image
    2       moments of the distribution: mean, std
    C       channels of the latent
    h, w    height and width of the latent

The metadata, under the key "about", is {"layout": "easy-diffusion latents", "version": 1,
"fingerprint": ..., "mirrored": ..., "count": N}. The layout contains the name of this project, Easy
Diffusion. The fingerprint is a string that identifies the autoencoder, because latents from a
different autoencoder are incompatible.

The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it, lmdb_environment.py and
lmdb_store.py.

>>> import tempfile
>>> from .lmdb_store import append_records
>>> folder = tempfile.mkdtemp()
>>> images = [torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(5)]
>>> records = [(image, "番茄汤") for image in images]
>>> _ = list(append_records(folder + "/images", records))  # a generator: it writes when iterated
>>> def encode(images):
...     return images.float().mean(1, keepdim=True), torch.zeros(len(images), 1, 8, 8)
>>> counts = list(encode_store(folder + "/images", folder + "/latents", encode, "channel mean"))
>>> latent, caption = LatentLmdb(folder + "/latents", "channel mean")[3]
>>> counts, tuple(latent.shape), latent.unique().tolist(), caption
([5], (1, 8, 8), [3.0], '番茄汤')
"""

import json
import struct
from collections.abc import Callable, Iterator

import torch

from .lmdb_environment import commit, open_writer, read_metadata, recover
from .lmdb_store import ImageCaptionStore, read_record, record_key, split_record

LAYOUT = "easy-diffusion latents"
VERSION = 1


class LatentLmdb(torch.utils.data.Dataset):
    """Item i is (z float32 [C, h, w], caption); z is drawn anew at each access.

    If the mirrored images are encoded as well, z is that of the mirrored image with probability
    1/2. Both use torch's global generator.

    folder: a latent store that `encode_store` has written
    fingerprint: if given, the fingerprint of the autoencoder that is to decode the latents

    Raises FileNotFoundError if there is no latent store, ValueError for an LMDB file of another
    layout or for latents from a different autoencoder. An access raises KeyError for a missing
    record and ValueError for a damaged one.
    """

    def __init__(self, folder, fingerprint: str | None = None):
        metadata = read_latents_metadata(folder)
        if metadata is None:
            raise FileNotFoundError(f"no latents in {folder}: `encode_store` writes them")
        if fingerprint is not None and metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} holds latents of the autoencoder {metadata['fingerprint']}, not of"
                f" {fingerprint}: encode the images again, into another folder, or use that"
                " autoencoder"
            )
        self.folder = str(folder)
        self.length = metadata["count"]
        self.fingerprint = metadata["fingerprint"]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        moments, caption = read_record(self.folder, index, self.length, parse_latent_record)
        mean, std = moments
        return mean + std * torch.randn(mean.shape), caption


def parse_latent_record(record) -> tuple[torch.Tensor, str]:
    """Return (mean and std float32 [2, C, h, w], caption) of one record, bytes or a buffer.

    If the record holds two views, the image and its mirror image, one of them is chosen at random.
    """
    header, values = split_record(record)
    flat = torch.frombuffer(bytearray(values), dtype=torch.float16)
    moments = flat.view(header["shape"])  # [F, 2, C, h, w]
    view = int(torch.randint(len(moments), ()))
    return moments[view].float(), header["caption"]


def read_latents_metadata(folder) -> dict | None:
    """Return the metadata of a latent store as a dict; None if nothing has been written yet.

    Raises ValueError for an LMDB file of another layout.
    """
    serialized = read_metadata(folder)
    if serialized is None:
        return None
    try:
        metadata = json.loads(serialized)
        is_latent_store = metadata["layout"] == LAYOUT and metadata["version"] == VERSION
    except (ValueError, TypeError, KeyError):
        is_latent_store = False
    if not is_latent_store:
        raise ValueError(f"{folder} holds an LMDB, but not a latent store of version {VERSION}")
    return metadata


@torch.no_grad()
def encode_store(
    store_folder,
    latents_folder,
    encode: Callable,
    fingerprint: str,
    mirrored: bool = False,
    batch_size: int = 64,
) -> Iterator[int]:
    """Encode each image of a store into a latent store.

    If the latent store exists, only the images that it lacks are encoded, so that a call resumes
    an interrupted one.

    store_folder: folder of an ImageCaptionStore
    latents_folder: folder of the latent store
    encode: a function from images uint8 [B, 3, H, W] to (mean, std), [B, C, h, w] each
    fingerprint: a string that identifies the autoencoder
    mirrored: encode the mirrored images as well
    batch_size: number of images that are encoded and committed at once

    Yields the number of latents after each commit. Raises ValueError if the latent store belongs to
    another autoencoder, to other images or to another choice of `mirrored`.
    """
    recover(latents_folder)
    store = ImageCaptionStore(store_folder)
    settings = {
        "layout": LAYOUT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "mirrored": mirrored,
    }
    metadata = read_latents_metadata(latents_folder)
    if metadata is not None:
        _check_resumable(store, latents_folder, metadata, settings)
    count = 0 if metadata is None else metadata["count"]
    if count == len(store):
        return

    with open_writer(latents_folder) as environment:
        # The bytes of the metadata in the store: `commit` checks that they are unchanged.
        previous_metadata = None
        if metadata is not None:
            previous_metadata = _serialize_metadata(settings, count)

        for start in range(count, len(store), batch_size):
            stop = min(start + batch_size, len(store))
            images, captions = zip(*[store[index] for index in range(start, stop)])
            moments = _encode_images(torch.stack(images), encode, mirrored)  # [B, F, 2, C, h, w]
            if not torch.isfinite(moments).all():
                raise ValueError(
                    f"the latents of records {start} to {stop - 1} are not finite in float16"
                )
            items = []
            for index, image_moments, caption in zip(range(start, stop), moments, captions):
                items.append((record_key(index), _serialize_record(image_moments, caption)))
            new_metadata = _serialize_metadata(settings, stop)
            commit(environment, items, new_metadata, previous_metadata)
            previous_metadata = new_metadata
            yield stop


def _check_resumable(store, latents_folder, metadata: dict, settings: dict) -> None:
    """Raise ValueError unless a latent store belongs to these settings and to the store's images.

    The images are compared by their number and by the caption of the last latent only.
    """
    count = metadata["count"]
    if metadata != settings | {"count": count}:
        raise ValueError(
            f"{latents_folder} holds latents of the autoencoder {metadata['fingerprint']},"
            f" mirrored={metadata['mirrored']}, not of {settings['fingerprint']},"
            f" mirrored={settings['mirrored']}: use another folder or remove this one"
        )
    is_of_other_images = count > len(store)
    if 0 < count <= len(store):
        _, last_caption = LatentLmdb(latents_folder)[count - 1]
        _, expected_caption = store[count - 1]
        is_of_other_images = last_caption != expected_caption
    if is_of_other_images:
        raise ValueError(
            f"{latents_folder} holds latents of other images than those of {store.folder}"
        )


def _encode_images(images: torch.Tensor, encode: Callable, mirrored: bool) -> torch.Tensor:
    """Encode images uint8 [B, 3, H, W], and their mirror images: float16 [B, F, 2, C, h, w]."""
    views = [images, images.flip(3)] if mirrored else [images]
    moments = []
    for view in views:
        mean, std = encode(view)  # [B, C, h, w] each
        moments.append(torch.stack([mean, std], dim=1))  # [B, 2, C, h, w]
    return torch.stack(moments, dim=1).half().cpu()


def _serialize_record(moments: torch.Tensor, caption: str) -> bytes:
    """Serialize one record: length of the header, header, moments float16 [F, 2, C, h, w]."""
    fields = {"caption": caption, "shape": list(moments.shape)}
    header = json.dumps(fields, ensure_ascii=False).encode()
    return struct.pack("<I", len(header)) + header + moments.numpy().tobytes()


def _serialize_metadata(settings: dict, count: int) -> bytes:
    return json.dumps(settings | {"count": count}).encode()
