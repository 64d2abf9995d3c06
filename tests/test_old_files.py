"""Files that version 1 wrote are still read: checkpoints, weights, stores and a folder of a run.

`old_files/` holds one file of each kind, compressed. The large ones have their tensors set to zero.
"""

import copy
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from datasets.caption_embeddings import StoredCaptionEmbeddings
from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS
from datasets.latents_lmdb import LatentLmdb
from datasets.lmdb_store import ImageCaptionStore
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.timesteps import ImportanceTimesteps
from easy_diffusion.dish_classifier import load_or_train_classifier, old_path
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier
from easy_diffusion.latent_space import fingerprint
from easy_diffusion.networks.autoencoder import Autoencoder, load_autoencoder
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.weights_io import load_tree, load_weights
from easy_diffusion.train_model import main
from easy_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.progress import read_rows
from easy_diffusion.training.train_autoencoder import train_autoencoder
from easy_diffusion.training.trainer import train

OLD = Path(__file__).with_name("old_files")


@pytest.fixture
def old(tmp_path):
    """A writable copy of `old_files`, decompressed."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    for path in folder.rglob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return folder


class TinyNetwork(torch.nn.Module):
    """The network of old_files/training.safetensors."""

    context_dim = 4

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t, context, mask):
        return self.conv(x_t)


def test_an_old_training_resumes_with_the_losses_of_the_old_code(old, hide_gpu):
    """The old code went on from step 6 to step 8 with the losses in losses.json.

    They were computed with bfloat16 autocast. Without it rounding differs, hence the tolerance.
    """
    torch.manual_seed(0)
    timesteps = ImportanceTimesteps(100, history=1)
    steps = list(train(
        TinyNetwork(),
        GaussianDiffusion(NoiseSchedule.cosine(100)),
        make_loader(ImageCaptionStore(old / "store"), 4),
        CharacterEncoder("番茄土豆汤", dim=4, layers=1, heads=1),
        steps=9, timesteps=timesteps, checkpoint=old / "training.safetensors",
        decay=0, warmup=1, learning_rate=1e-2, caption_dropout=0.5,
    ))
    assert [step.index for step in steps] == [6, 7, 8]
    expected = json.loads((old / "losses.json").read_text())
    torch.testing.assert_close([step.loss for step in steps], expected, rtol=0, atol=0.02)
    assert timesteps.counts.sum() == 9 * 4


def test_an_old_checkpoint_has_the_new_keys_once_it_is_loaded_and_once_it_is_written_again(old):
    raw = load_tree(old / "training.safetensors")
    loaded = load_checkpoint(old / "training.safetensors")
    assert {"average", "predicts", "pictures", "guard", "halved", "pieces"} <= raw.keys()
    for key in ("ema", "images_per_step", "health", "micro_batches", "micro_batches_doubled"):
        assert key in loaded
    assert loaded["prediction_type"] == "eps" and raw["predicts"] == "noise"
    assert loaded["images_per_step"] == raw["pictures"] == 4
    assert loaded["health"]["snapshot_step"] == raw["guard"]["copied_at"]
    assert torch.equal(loaded["timesteps"]["counts"], raw["timesteps"]["drawn"])
    assert not {"average", "predicts", "pictures", "guard", "halved", "pieces"} & loaded.keys()


def test_an_old_autoencoder_is_loaded_and_matches_its_old_latents(old):
    autoencoder = load_autoencoder(old / "autoencoder.safetensors")
    assert autoencoder.settings["image_channels"] == 3
    assert (autoencoder.scale, autoencoder.shift) == (2.0, 0.5)
    latents = LatentLmdb(old / "latents", fingerprint(autoencoder))
    assert len(latents) == 8 and latents[0][0].shape == (2, 4, 4)
    assert latents[1][1] == "番茄汤"


def test_an_old_training_of_an_autoencoder_resumes(old):
    loader = make_loader(ImageCaptionStore(old / "store"), 4)
    autoencoder = Autoencoder((32,), latent_channels=2, blocks=1, patch=2)
    steps = list(train_autoencoder(
        autoencoder, loader, steps=3, checkpoint=old / "autoencoder.training.safetensors"
    ))
    assert [step.index for step in steps] == [2]
    saved = load_checkpoint(old / "autoencoder.training.safetensors")
    assert "ema" in saved["models"] and "average" not in saved["models"]


def test_an_old_attribute_classifier_is_loaded(old):
    classifier = AttributeClassifier(["番茄", "土豆"], ["汤"], width=8)
    before = copy.deepcopy(classifier.state_dict())
    load_weights(classifier, load_checkpoint(old / "reader.safetensors"))
    assert not torch.equal(classifier.head.weight, before["head.weight"])


def test_the_classifier_in_an_old_out_folder_is_found_and_not_trained_again(tmp_path):
    old = AttributeClassifier(INGREDIENTS, WAYS)
    save_checkpoint(tmp_path / "reader_64_3000.safetensors", old.state_dict())
    loaded = load_or_train_classifier(64, 3000, tmp_path)
    for name, weight in old.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    views = tmp_path / "view_classifier_10.safetensors"
    assert old_path(views) == tmp_path / "reader_of_frames_10.safetensors"


def test_an_old_store_gives_its_images_captions_and_embeddings(old):
    store = ImageCaptionStore(old / "store")
    image, caption = store[3]
    assert len(store) == 8 and image.shape == (3, 8, 8) and caption == "番茄汤"
    expected = torch.randint(
        256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(image, expected)
    context, mask = StoredCaptionEmbeddings(old / "store", "an encoder")(["", "番茄汤"])
    assert context.shape == (2, 5, 2) and mask.all()
    assert context[0].flatten().tolist() == list(range(10))


def test_an_old_folder_of_a_run_goes_on_and_its_log_has_each_step_once(old):
    """run.json, log.csv and model.safetensors of the old command, whose options had other names."""
    arguments = [
        "--data", str(old / "store"), "--out", str(old / "run"), "--steps", "4",
        "--channels", "32", "--attention", "0", "--blocks", "1", "--heads", "1",
        "--text-dim", "8", "--patch", "4", "--batch-size", "4", "--sample-minutes", "0",
        "--log-every", "1", "--keep", "1", "--muon-learning-rate", "0",
    ]
    assert main(arguments) == 0
    rows = read_rows(old / "run" / "log.csv")
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert "pictures_per_second" not in rows[0]
    options = json.loads((old / "run" / "run.json").read_text("utf-8"))
    assert options["prediction_type"] == "x0" and options["text_dim"] == 8
    assert "predicts" not in options


def test_an_old_run_of_another_network_is_refused_by_the_options_new_names(old):
    arguments = [
        "--data", str(old / "store"), "--out", str(old / "run"), "--steps", "4",
        "--channels", "32", "--attention", "0", "--blocks", "1", "--heads", "1",
        "--text-dim", "16", "--patch", "4", "--batch-size", "4", "--sample-minutes", "0",
    ]
    with pytest.raises(ValueError, match="text_dim: 8, not 16"):
        main(arguments)
