"""Pictures that an autoencoder has encoded already: encode once, train often.

An encoder is as costly as a step of the network that is to learn from it, and says the same of the same picture each time. So each picture
of a store is encoded once, and a second store holds what came out: the mean and the deviation of its latent, so that each epoch can draw
z = mean + deviation · ε anew. A latent is small: 4×16×16 numbers for a picture of 3×128×128.

The layout is that of lmdb_store.py, with records of their own: the length of a header (4 bytes, little-endian), the header, JSON in UTF-8,
{"caption": ..., "shape": [F, 2, Z, h, w]}, and so many float16 numbers: F is 2 if the mirrored picture is there, too, else 1; 2 is for
mean and deviation. Under "about" stands also the fingerprint of the autoencoder: latents of another one are a foreign language. The file
needs lmdb, Pillow, numpy, torch and tqdm and, beside it, lmdb_store.py.

>>> import tempfile
>>> from .lmdb_store import append
>>> folder = tempfile.mkdtemp()
>>> for _ in append(folder + "/pictures", [(torch.full((3, 8, 8), i, dtype=torch.uint8), "番茄汤") for i in range(5)]): pass
>>> def encode(pictures): return pictures.float().mean(1, keepdim=True), torch.zeros(len(pictures), 1, 8, 8)
>>> *_, count = encode_store(folder + "/pictures", folder + "/latents", encode, "the mean of three colours")
>>> latent, caption = LatentLmdb(folder + "/latents", "the mean of three colours")[3]
>>> count, tuple(latent.shape), latent.unique().tolist(), caption
(5, (1, 8, 8), [3.0], '番茄汤')
"""

import json
import struct
from collections.abc import Callable, Iterator

import torch

from .lmdb_store import METADATA_KEY, ImageCaptionStore, commit, decode_header, open_writer, read_metadata, read_record, record_key, recover

LAYOUT, VERSION = "easy-diffusion latents", 1


class LatentLmdb(torch.utils.data.Dataset):
    """Item i is (z float32 [Z, h, w], caption), z drawn anew at each access, of the mirrored picture half of the time if that is stored.

    fingerprint: if given, of the autoencoder that is to decode. Raises FileNotFoundError where there are no latents, ValueError for an
    LMDB of something else, or latents of another autoencoder; KeyError or ValueError at a record that is missing or damaged.
    """

    def __init__(self, folder, fingerprint: str | None = None):
        self.folder, about = str(folder), read_latents_metadata(folder)
        if about is None:
            raise FileNotFoundError(f"no latents in {folder}: `encode_store` writes them")
        if fingerprint is not None and about["fingerprint"] != fingerprint:
            raise ValueError(f"{folder} holds latents of the autoencoder {about['fingerprint']}, not of {fingerprint}: encode the pictures "
                             "again, into another folder, or take that autoencoder")
        self.length, self.fingerprint = about["count"], about["fingerprint"]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        (mean, deviation), caption = read_record(self.folder, index, self.length, decode_latent_record)
        return mean + deviation * torch.randn(mean.shape), caption


def decode_latent_record(record) -> tuple[torch.Tensor, str]:
    """(mean and deviation float32 [2, Z, h, w], caption) of a record, of one of its F views by chance."""
    header = decode_header(record)
    size, = struct.unpack_from("<I", record)
    latents = torch.frombuffer(bytearray(record[4 + size:]), dtype=torch.float16).view(header["shape"])     # [F, 2, Z, h, w]
    return latents[int(torch.randint(len(latents), ()))].float(), header["caption"]


def read_latents_metadata(folder) -> dict | None:
    """What a folder of latents says of itself: its "count" and its "fingerprint"; None where there is nothing yet. ValueError for an LMDB
    of something else."""
    about = read_metadata(folder)
    if about is None:
        return None
    try:
        about = json.loads(about)
        known = about["layout"] == LAYOUT and about["version"] == VERSION
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"{folder} holds an LMDB, but not one of latents of version {VERSION}")
    return about


@torch.no_grad()
def encode_store(pictures, folder, encode: Callable, fingerprint: str, mirrored: bool = False, batch: int = 64) -> Iterator[int]:
    """Encode each picture of a store, or go on; yields the number of latents after each transaction, once they are committed.

    pictures: an ImageCaptionStore's folder. encode: pictures uint8 [B, 3, H, W] → mean and deviation, [B, Z, h, w] each. fingerprint: a str
    that is another for another autoencoder. mirrored: encode the mirrored pictures, too. Raises ValueError for a folder that holds latents
    of another autoencoder, of other pictures, or of another choice of `mirrored`.
    """
    recover(folder)
    store, about = ImageCaptionStore(pictures), read_latents_metadata(folder)
    wanted = {"layout": LAYOUT, "version": VERSION, "fingerprint": fingerprint, "mirrored": mirrored}
    done = about.pop("count") if about is not None else 0
    if about is not None and about != wanted:
        raise ValueError(f"{folder} holds latents of the autoencoder {about['fingerprint']}, mirrored={about['mirrored']}, not of "
                         f"{fingerprint}, mirrored={mirrored}: give another folder, or remove it")
    if done > len(store) or (done and LatentLmdb(folder)[done - 1][1] != store[done - 1][1]):
        raise ValueError(f"{folder} holds latents of other pictures than those of {pictures}")
    if done == len(store):
        return
    with open_writer(folder) as environment:
        before = json.dumps(wanted | {"count": done}).encode() if about is not None else None
        for first in range(done, len(store), batch):
            some, captions = zip(*[store[i] for i in range(first, min(first + batch, len(store)))])
            some = torch.stack(some)                                        # [B, 3, H, W]
            views = [torch.stack(encode(view), dim=1) for view in ([some, some.flip(3)] if mirrored else [some])]
            latents = torch.stack(views, dim=1).half().cpu()                # [B, F, 2, Z, h, w]
            if not torch.isfinite(latents).all():
                raise ValueError(f"the latents of records {first} to {first + len(some) - 1} are not finite in float16")
            headers = [json.dumps({"caption": caption, "shape": list(latents.shape[1:])}, ensure_ascii=False).encode()
                       for caption in captions]
            rows = [(record_key(first + i), struct.pack("<I", len(header)) + header + latent.numpy().tobytes())
                    for i, (header, latent) in enumerate(zip(headers, latents))]
            now = json.dumps(wanted | {"count": first + len(some)}).encode()
            commit(environment, [*rows, (METADATA_KEY, now)], before)
            before = now
            yield first + len(some)
