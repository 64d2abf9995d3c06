"""What a large text encoder makes of the captions of a store, kept beside the pictures.

Such an encoder need read each caption but once: `write_states` keeps its states in the store, and `StoredStates` gives them back, so that
a network trains without the encoder in memory. Under the key "states" stands {"fingerprint": ..., "dim": D}, under "states " and 16 bytes
of a caption's hash its states, float16 [L, D] without padding. The file needs lmdb, Pillow, numpy, torch and tqdm and, beside it,
lmdb_store.py.

>>> import tempfile
>>> from .lmdb_store import append
>>> folder = tempfile.mkdtemp()
>>> for count in append(folder, [(torch.zeros(3, 8, 8, dtype=torch.uint8), "番茄汤")]): pass
>>> def ones(captions): return torch.ones(len(captions), 5, 2), torch.ones(len(captions), 5, dtype=torch.bool)
>>> list(write_states(folder, ones, "an encoder that says 1"))
[(2, 2)]
>>> states, mask = StoredStates(folder)(["番茄汤", ""])
>>> tuple(states.shape), mask.sum().item()
((2, 5, 2), 10)
"""

import hashlib
import json
from collections.abc import Iterator

import torch

from .lmdb_store import commit, count_records, open_reader, open_writer, read_captions

EMBEDDINGS = b"states"


@torch.no_grad()
def write_caption_embeddings(folder, encoder, fingerprint: str, batch: int = 64) -> Iterator[tuple[int, int]]:
    """Write the states of each distinct caption of a store, and of the empty one; yields (how many are written, how many there are).

    encoder: captions → states [B, L, D], mask [B, L]. fingerprint: a str that is another for another encoder. What is there already is
    not encoded again. Raises ValueError if it came from an encoder of another fingerprint.
    """
    known = _read_embedding_metadata(folder)
    wanted = ["", *dict.fromkeys(caption for caption in read_captions(folder) if caption)]
    if known is not None and known["fingerprint"] != fingerprint:
        raise ValueError(f"{folder} holds states of the encoder {known['fingerprint']}, and this one is {fingerprint}: "
                         "build the store anew, or take that encoder")
    with open_reader(folder) as transaction:
        missing = [caption for caption in wanted if transaction.get(_embedding_key(caption)) is None]
    if not missing:                                                         # on read-only media, too
        return
    with open_writer(folder) as environment:
        for first in range(0, len(missing), batch):
            some = missing[first:first + batch]
            states, mask = encoder(some)                                    # [B, L, D], [B, L]
            about = json.dumps({"fingerprint": fingerprint, "dim": states.shape[-1]}).encode()
            rows = [(_embedding_key(caption), row[real].half().cpu().numpy().tobytes()) for caption, row, real in zip(some, states, mask)]
            commit(environment, [(EMBEDDINGS, about), *rows])
            yield len(wanted) - len(missing) + first + len(some), len(wanted)


class StoredCaptionEmbeddings(torch.nn.Module):
    """The states that `write_states` kept, in an encoder's place: captions → states float32 [B, L, D] and mask bool [B, L].

    fingerprint: if given, of the encoder that one wants. Raises ValueError for a store without states, or of another encoder, and
    KeyError for a caption that it does not know.
    """

    def __init__(self, folder, fingerprint: str | None = None):
        super().__init__()
        self.folder, about = str(folder), _read_embedding_metadata(folder)
        if about is None:
            raise ValueError(f"{folder} holds no states of captions: `write_states` writes them")
        if fingerprint is not None and about["fingerprint"] != fingerprint:
            raise ValueError(f"{folder} holds states of the encoder {about['fingerprint']}, not of {fingerprint}")
        self.dim, self.fingerprint = about["dim"], about["fingerprint"]
        self.register_buffer("place", torch.empty(0), persistent=False)     # tells the device that this module was moved to

    def forward(self, read_captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        with open_reader(self.folder) as transaction:
            for caption in read_captions:
                content = transaction.get(_embedding_key(caption))
                if content is None:
                    raise KeyError(f"{self.folder} holds no states of the caption {caption!r}")
                rows.append(torch.frombuffer(bytearray(content), dtype=torch.float16).view(-1, self.dim))       # [L, D]
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()                                # [B, L, D]
        mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]                # [B, L]
        return states.to(self.place.device), mask.to(self.place.device)


def _embedding_key(caption):
    return EMBEDDINGS + b" " + hashlib.blake2b(caption.encode(), digest_size=16).digest()


def _read_embedding_metadata(folder):
    if not count_records(folder):
        raise FileNotFoundError(f"no store in {folder}: `append` writes one")
    with open_reader(folder) as transaction:
        about = transaction.get(EMBEDDINGS)
        return json.loads(bytes(about)) if about is not None else None
