"""Stored caption embeddings: what a store returns equals what the encoder returns."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from datasets.caption_embeddings import StoredCaptionEmbeddings, write_caption_embeddings
from datasets.dishes import Dishes
from datasets.lmdb_store import ImageCaptionStore, append_records, read_captions
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.trainer import train


def write(folder, records):
    for _ in append_records(folder, records):
        pass


def write_embeddings(folder, encoder, fingerprint):
    for _ in write_caption_embeddings(folder, encoder, fingerprint):
        pass


class CharacterCodes(torch.nn.Module):
    """A text encoder for tests: a start token and one token per character, from its code point."""

    def __init__(self):
        super().__init__()
        self.dim = 4
        self.encoded = 0  # number of captions that have been encoded

    def forward(self, captions):
        self.encoded += len(captions)
        lengths = torch.tensor([len(caption) + 1 for caption in captions])
        context = torch.zeros(len(captions), lengths.max(), self.dim)
        for row, caption in zip(context, captions):
            tokens = [[1.0] * 4]
            tokens += [[ord(character) / 3e4, 2.0, 3.0, 4.0] for character in caption]
            row[: len(tokens)] = torch.tensor(tokens)
        mask = torch.arange(lengths.max()) < lengths[:, None]
        return context, mask


class ConstantEncoder(CharacterCodes):
    """A text encoder that ignores the caption."""

    def forward(self, captions):
        context, mask = super().forward(["" for _ in captions])
        return -context, mask


def test_stored_embeddings_equal_the_encoders_in_half_precision(tmp_path):
    folder = tmp_path / "store"
    dishes = Dishes(60, 32)
    encoder = CharacterCodes()
    write(folder, dishes)
    names = list(read_captions(folder))
    assert names == [name for _, name in dishes]

    # Each distinct caption, and the empty one, is encoded once.
    *_, progress = write_caption_embeddings(folder, encoder, "codes", batch_size=7)
    distinct = len(set(names)) + 1
    assert progress == (distinct, distinct)
    assert encoder.encoded == distinct
    assert list(write_caption_embeddings(folder, encoder, "codes")) == []
    assert encoder.encoded == distinct

    stored = StoredCaptionEmbeddings(folder, "codes")
    context, mask = stored([names[3], "", names[5]])
    expected_context, expected_mask = encoder([names[3], "", names[5]])
    assert torch.equal(mask, expected_mask)
    assert stored.dim == 4
    assert torch.equal(context[mask], expected_context.half().float()[mask])

    # When the store grows, only the new caption is encoded.
    write(folder, [(torch.zeros(3, 32, 32, dtype=torch.uint8), "新菜")])
    progress = list(write_caption_embeddings(folder, encoder, "codes"))
    assert progress == [(distinct + 1, distinct + 1)]
    assert len(ImageCaptionStore(folder)) == 61
    assert stored(["新菜"])[1].sum() == 3


def test_embeddings_of_a_different_encoder_raise(tmp_path):
    folder = tmp_path / "store"
    write(folder, Dishes(3, 32))
    with pytest.raises(ValueError, match="no caption embeddings"):
        StoredCaptionEmbeddings(folder)
    write_embeddings(folder, CharacterCodes(), "old")
    with pytest.raises(ValueError, match="encoder old, and this one is new"):
        list(write_caption_embeddings(folder, CharacterCodes(), "new"))
    with pytest.raises(ValueError, match="encoder old, not of new"):
        StoredCaptionEmbeddings(folder, "new")
    with pytest.raises(KeyError, match="没有"):
        StoredCaptionEmbeddings(folder)(["没有"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        StoredCaptionEmbeddings(tmp_path / "nowhere")


def test_training_with_stored_embeddings_equals_training_with_the_encoder(tmp_path, hide_gpu):
    folder = tmp_path / "store"
    dishes = Dishes(8, 32)
    write(folder, dishes)
    write_embeddings(folder, CharacterCodes(), "codes")
    batches = [torch.utils.data.default_collate([dishes[i] for i in range(8)])]
    weights = []
    for encoder in (CharacterCodes(), StoredCaptionEmbeddings(folder), ConstantEncoder()):
        torch.manual_seed(0)
        network = UNet(channels=(32,), context_dim=4, patch=4)
        steps = train(
            network,
            GaussianDiffusion(NoiseSchedule.cosine(100)),
            batches,
            encoder,
            steps=8,
            learning_rate=1e-2,
            warmup=1,
            decay=0,
            accelerator=Accelerator(mixed_precision="no"),
        )
        for _ in steps:
            pass
        flat = torch.cat([parameter.flatten() for parameter in network.parameters()])
        weights.append(flat.detach().cpu())
    with_encoder, with_stored, with_constant = weights
    torch.testing.assert_close(with_encoder, with_stored, rtol=0, atol=1e-2)
    # Other embeddings lead to other weights.
    assert float((with_encoder - with_constant).abs().max()) > 0.05


def test_a_store_on_a_read_only_medium_can_be_read(tmp_path):
    folder = tmp_path / "store"
    dishes = Dishes(5, 32)
    write(folder, dishes)
    write_embeddings(folder, CharacterCodes(), "codes")
    (folder / "lock.mdb").unlink()  # a store may be copied to the medium without this file
    program = """
import sys
from datasets.caption_embeddings import StoredCaptionEmbeddings
from datasets.lmdb_store import ImageCaptionStore
store = ImageCaptionStore(sys.argv[1])
print(ascii([store[i][1] for i in range(5)]))
print(StoredCaptionEmbeddings(sys.argv[1])([""])[1].tolist())
"""
    command = [sys.executable, "-c", program, str(folder)]
    if os.geteuid() == 0:  # root may write to a folder without permission: mount it read-only
        if not shutil.which("unshare"):
            pytest.skip("root, and no `unshare` to mount a folder read-only with")
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, str(folder), *command]
        if subprocess.run([*command[:6], "true"], capture_output=True).returncode:
            pytest.skip("this system does not allow mounting a folder read-only")
    else:
        folder.chmod(0o555)
    result = subprocess.run(command, capture_output=True, text=True)
    folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert ascii([dishes[i][1] for i in range(5)]) in result.stdout
    assert not (folder / "lock.mdb").exists()
