"""Trained models as files: they rebuild the model, and the shipped ones are those of the preset."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from datasets.dishes import dish_names
from easy_diffusion import presets, pretrained, train_demo
from easy_diffusion.generate import generate_images
from easy_diffusion.networks.weights_io import load_tree, save_tree

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights"


def test_a_saved_model_is_rebuilt_with_its_weights_rounded_to_half_precision(tmp_path):
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("番茄炒鸡蛋")
    model = pretrained.Model(network, encoder, diffusion, autoencoder=None)
    pretrained.save_model(tmp_path, 32, model, {"steps": 7})
    rebuilt = pretrained.load_model(tmp_path, 32)
    for name in ("network", "encoder"):
        saved, loaded = getattr(model, name), getattr(rebuilt, name)
        assert loaded.settings == saved.settings
        assert not loaded.training
        for key, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[key].cpu(), tensor.half().float())
    assert torch.equal(rebuilt.diffusion.schedule.betas, diffusion.schedule.betas)
    assert rebuilt.diffusion.prediction_type == "x0"
    assert load_tree(pretrained.model_path(tmp_path, 32))["training"] == {"steps": 7}


def test_the_autoencoder_of_a_model_is_rebuilt_with_its_scale_and_shift(random_weights):
    model = pretrained.load_model(random_weights)           # the largest: 64 pixels, on latents
    assert pretrained.find_sizes(random_weights) == [32, 64]
    assert model.autoencoder.settings["latent_channels"] == 16
    images = generate_images(*model[:3], ["番茄汤"], 64, steps=2, autoencoder=model.autoencoder)
    assert images.shape == (1, 64, 64, 3)


def test_a_missing_size_a_missing_folder_and_incompatible_files_are_named(random_weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="train_demo trains one"):
        pretrained.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="models for 32, 64 pixels, not for 128"):
        pretrained.load_model(random_weights, 128)
    model = pretrained.load_model(random_weights, 64)
    pretrained.save_model(tmp_path, 64, model)
    changed = model.autoencoder
    changed.scale = 2.0
    pretrained.save_autoencoder(pretrained.autoencoder_path(tmp_path, 64), changed)
    with pytest.raises(ValueError, match="latents of another autoencoder"):
        pretrained.load_model(tmp_path, 64)
    save_tree(pretrained.model_path(tmp_path, 32), {"index": 7})
    with pytest.raises(ValueError, match="not a model"):
        pretrained.load_model(tmp_path, 32)


def documented_commands() -> dict[int, object]:
    """The options of the training commands in weights/README.md, by image size."""
    text = (WEIGHTS / "README.md").read_text("utf-8")
    commands = re.findall(r"^python -m easy_diffusion\.train_demo (.*)$", text, re.M)
    options = [train_demo.parse_options(shlex.split(command)) for command in commands]
    return {option.size: option for option in options}


@pytest.mark.parametrize("size", [64, 128])
def test_the_shipped_model_is_that_of_its_documented_command(size):
    """Its networks are the preset's; its data and hyperparameters are those of the command."""
    options = documented_commands()[size]
    model = pretrained.load_model(WEIGHTS, size)
    assert options.latent == (model.autoencoder is not None)
    if options.latent:
        expected = dict(image_channels=3, blocks=2) | presets.AUTOENCODER
        assert model.autoencoder.settings == expected
    network, encoder, diffusion = presets.build_networks(
        "".join(dish_names("train")), model.autoencoder
    )
    assert model.network.settings == network.settings
    assert model.encoder.settings == encoder.settings
    assert model.diffusion.prediction_type == diffusion.prediction_type
    # The cosines of another processor may differ by their last bit.
    torch.testing.assert_close(
        model.diffusion.schedule.betas, diffusion.schedule.betas, rtol=1e-9, atol=0
    )

    training = load_tree(pretrained.model_path(WEIGHTS, size))["training"]
    assert training.pop("steps") > 0
    assert training.pop("minutes") == pytest.approx(options.minutes, rel=0.02)
    assert training == presets.describe_training(
        options.dishes, options.batch_size, options.latent
    )


def test_the_shipped_weights_are_in_half_precision_and_at_most_36_megabytes():
    paths = sorted(WEIGHTS.glob("*.safetensors"))
    assert [path.name for path in paths] == [
        "autoencoder_128.safetensors", "text_to_image_128.safetensors",
        "text_to_image_64.safetensors",
    ]
    assert sum(path.stat().st_size for path in paths) <= 36e6
    for path in paths:
        tree = load_tree(path)
        for part in ("weights", "network", "encoder"):
            for name, tensor in tree.get(part, {}).items():
                assert tensor.dtype == torch.float16, name
