"""The token embeddings of a store's captions: computed once, stored beside the images.

Token embeddings are the outputs of the text encoder, its last hidden states: one vector per token.
A frozen encoder returns the same token embeddings each time that it encodes a caption.
`write_caption_embeddings` therefore encodes each distinct caption of a store once.
`StoredCaptionEmbeddings` reads the embeddings and takes the place of the encoder in training, which
then does not need the encoder in memory.

Two kinds of entries are added to the store (see lmdb_store.py):

    "states"                      JSON: {"fingerprint": ..., "dim": D}
    "states " + 16-byte hash of   float16 [L, D]: the embeddings of the caption's L tokens,
        the caption               without padding

The fingerprint is a string that identifies the encoder. The keys say "states", for the encoder's
hidden states, so that files of earlier versions remain readable.

The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it, lmdb_environment.py and
lmdb_store.py.

>>> import tempfile
>>> from .lmdb_store import append_records
>>> folder = tempfile.mkdtemp()
>>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
>>> _ = list(append_records(folder, [(image, "番茄汤")]))  # a generator: it writes when iterated
>>> def encoder(captions):
...     return torch.ones(len(captions), 5, 2), torch.ones(len(captions), 5, dtype=torch.bool)
>>> list(write_caption_embeddings(folder, encoder, "ones"))  # two captions: "番茄汤" and ""
[(2, 2)]
>>> context, mask = StoredCaptionEmbeddings(folder)(["番茄汤", ""])
>>> tuple(context.shape), mask.sum().item()
((2, 5, 2), 10)
"""

import hashlib
import json
from collections.abc import Callable, Iterator

import torch
from torch.nn.utils.rnn import pad_sequence

from .lmdb_environment import commit, open_reader, open_writer
from .lmdb_store import count_records, read_captions

EMBEDDINGS_KEY = b"states"  # part of the file format


@torch.no_grad()
def write_caption_embeddings(
    folder, encoder: Callable, fingerprint: str, batch_size: int = 64
) -> Iterator[tuple[int, int]]:
    """Write the token embeddings of each distinct caption of a store, and of the empty caption.

    The empty caption is the unconditional context of classifier-free guidance.

    folder: the store
    encoder: a function from a list of captions to (context [B, L, D], mask [B, L])
    fingerprint: a string that identifies the encoder
    batch_size: number of captions per call of the encoder

    Yields (done, total) after each batch: the number of captions whose embeddings are in the store,
    and the number of distinct captions. The embeddings of earlier calls are kept and counted.
    Raises ValueError if the store has embeddings of an encoder with another fingerprint.
    """
    metadata = _read_embedding_metadata(folder)
    if metadata is not None and metadata["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} holds embeddings of the encoder {metadata['fingerprint']}, and this one is"
            f" {fingerprint}: build the store anew or use that encoder"
        )
    non_empty = [caption for caption in read_captions(folder) if caption]
    captions = ["", *dict.fromkeys(non_empty)]  # distinct, in the order of the records
    with open_reader(folder) as transaction:
        missing = [
            caption for caption in captions if transaction.get(_embedding_key(caption)) is None
        ]
    if not missing:  # do not open the store for writing: it may be on a read-only medium
        return

    done = len(captions) - len(missing)
    with open_writer(folder) as environment:
        for first in range(0, len(missing), batch_size):
            batch = missing[first : first + batch_size]
            context, mask = encoder(batch)  # [B, L, D], [B, L]
            metadata = {"fingerprint": fingerprint, "dim": context.shape[-1]}
            items = [(EMBEDDINGS_KEY, json.dumps(metadata).encode())]
            for caption, embeddings, valid in zip(batch, context, mask):
                values = embeddings[valid].half().cpu().numpy()  # [tokens without padding, D]
                items.append((_embedding_key(caption), values.tobytes()))
            commit(environment, items)
            done += len(batch)
            yield done, len(captions)


class StoredCaptionEmbeddings(torch.nn.Module):
    """The text encoder whose outputs a store holds: captions → context [B, L, D], mask [B, L].

    folder: a store to which `write_caption_embeddings` has added embeddings
    fingerprint: if given, the fingerprint that the store's encoder must have

    The context is float32, the mask bool (True = a token, False = padding). Raises ValueError for a
    store without embeddings or with those of another encoder; a call raises KeyError for a caption
    that has not been encoded.
    """

    def __init__(self, folder, fingerprint: str | None = None):
        super().__init__()
        metadata = _read_embedding_metadata(folder)
        if metadata is None:
            raise ValueError(
                f"{folder} holds no caption embeddings: `write_caption_embeddings` writes them"
            )
        if fingerprint is not None and metadata["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} holds embeddings of the encoder {metadata['fingerprint']}, not of"
                f" {fingerprint}"
            )
        self.folder = str(folder)
        self.dim = metadata["dim"]
        self.fingerprint = metadata["fingerprint"]
        # module.to(device) moves all buffers. This empty one shows where the outputs belong.
        self.register_buffer("device_buffer", torch.empty(0), persistent=False)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = []
        with open_reader(self.folder) as transaction:
            for caption in captions:
                value = transaction.get(_embedding_key(caption))
                if value is None:
                    raise KeyError(f"{self.folder} holds no embeddings of the caption {caption!r}")
                flat = torch.frombuffer(bytearray(value), dtype=torch.float16)
                embeddings.append(flat.view(-1, self.dim))  # [L of this caption, D]
        lengths = torch.tensor([len(rows) for rows in embeddings])  # [B]
        context = pad_sequence(embeddings, batch_first=True).float()  # [B, L, D]
        mask = torch.arange(context.shape[1]) < lengths[:, None]  # [B, L]
        device = self.device_buffer.device
        return context.to(device), mask.to(device)


def _embedding_key(caption: str) -> bytes:
    digest = hashlib.blake2b(caption.encode(), digest_size=16).digest()
    return EMBEDDINGS_KEY + b" " + digest


def _read_embedding_metadata(folder) -> dict | None:
    """Return {"fingerprint": ..., "dim": D}; None if the store has no caption embeddings."""
    if not count_records(folder):
        raise FileNotFoundError(f"no store in {folder}: `append_records` writes one")
    with open_reader(folder) as transaction:
        metadata = transaction.get(EMBEDDINGS_KEY)
        return None if metadata is None else json.loads(bytes(metadata))
