"""Weight files: trees in safetensors, atomic writing, and files that torch.save wrote.

More about trees is tested in tests/training/test_checkpoint.py, and more about `open_tensors` in
test_stable_diffusion_weights.py.
"""

import os
import random

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from easy_diffusion.networks import weights_io
from easy_diffusion.networks.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.networks.weights_io import (
    check_settings,
    load_tree,
    load_weights,
    open_tensors,
    read_tensors,
    save_tree,
)


def test_a_saved_tree_is_loaded_unchanged(tmp_path):
    plain = {
        "step": 7,
        "名": "番茄",
        "none": None,
        "flag": True,
        "sizes": [64, 128],
        "mixed": [1, "a", [2.5, None], {"b": []}],
        "empty": {},
        3: {4: "integer keys"},
    }
    tensors = {
        "half": torch.randn(2, 3).half(),
        "ids": torch.arange(5),
        "transposed": torch.randn(2, 3).T,
        "scalar": torch.tensor(2.0, dtype=torch.float64),
    }
    path = tmp_path / "new folder" / "a.safetensors"
    save_tree(path, {"plain": plain, "tensors": tensors, "list": [tensors["ids"], "end"]})
    loaded = load_tree(path)
    assert loaded["plain"] == plain
    assert loaded["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded["tensors"][name].dtype == tensor.dtype
        assert torch.equal(loaded["tensors"][name], tensor)
    assert torch.equal(loaded["list"][0], tensors["ids"])
    assert loaded["list"][1] == "end"
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_a_tree_may_be_a_single_tensor(tmp_path):
    save_tree(tmp_path / "a", torch.arange(3))
    assert load_tree(tmp_path / "a").tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [OSError("no space"), SafetensorError("no space")])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    def write_half(tensors, path, metadata):
        path.write_bytes(b"half of a file")
        raise error

    save_tree(tmp_path / "a", {"step": 1})
    monkeypatch.setattr(weights_io, "save_file", write_half)
    with pytest.raises(OSError, match="no space"):
        save_tree(tmp_path / "a", {"step": 2})
    with pytest.raises(OSError, match="no space"):
        save_tree(tmp_path / "b", {"step": 2})
    assert load_tree(tmp_path / "a") == {"step": 1}
    assert os.listdir(tmp_path) == ["a"]


def test_a_leaf_that_no_file_can_hold_is_named_and_the_old_file_stays(tmp_path):
    save_tree(tmp_path / "a", {"step": 1})
    with pytest.raises(TypeError, match="at 'models.0' there is a value of type Linear"):
        save_tree(tmp_path / "a", {"models": [torch.nn.Linear(1, 1)]})
    assert load_tree(tmp_path / "a") == {"step": 1}
    assert os.listdir(tmp_path) == ["a"]


def test_the_temporary_folder_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / "a.writing").mkdir()
    (tmp_path / "a.writing" / "a").write_bytes(b"half of a file")
    save_tree(tmp_path / "a", {"step": 1})
    assert load_tree(tmp_path / "a") == {"step": 1}
    assert os.listdir(tmp_path) == ["a"]


def test_a_module_that_weights_do_not_fit_keeps_its_own():
    layer = torch.nn.Linear(2, 3)
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="incompatible Linear"):
        load_weights(layer, {"weight": torch.zeros(3, 2)})
    assert torch.equal(layer.weight, weight)


# ---------------------------------------------------------------- settings


def saved_settings(tmp_path, **options):
    """The settings of a UNet after they have been in a file."""
    path = tmp_path / "settings.safetensors"
    save_tree(path, UNet(**dict(channels=(32, 64), context_dim=8, heads=2) | options).settings)
    return load_tree(path)


def test_settings_of_the_same_network_are_accepted_after_they_were_in_a_file(tmp_path):
    network = UNet(channels=(32, 64), context_dim=8, heads=2, attention=(False, True))
    check_settings(saved_settings(tmp_path, attention=(False, True)), network)


@pytest.mark.parametrize("options", [
    dict(heads=4),
    dict(patch=2),
    dict(pooled=True),
    dict(attention=(True, False)),
    dict(heads=4, blocks=1),
], ids=str)
def test_each_setting_that_differs_is_named(tmp_path, options):
    saved = saved_settings(tmp_path)
    network = UNet(**dict(channels=(32, 64), context_dim=8, heads=2) | options)
    with pytest.raises(ValueError, match="a UNet with other settings") as error:
        check_settings(saved, network)
    named = {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]}
    assert named == options.keys()


def test_dropout_checkpointing_and_settings_that_the_file_lacks_are_not_compared(tmp_path):
    saved = saved_settings(tmp_path, dropout=0.1)
    del saved["patch"]
    check_settings(saved, UNet(channels=(32, 64), context_dim=8, heads=2, checkpointing=True))


def test_weights_that_fit_with_other_heads_are_of_another_network():
    """Without the settings, nothing would tell them apart: the shapes are the same."""
    torch.manual_seed(0)
    two, four = UNet(channels=(32,), heads=2), UNet(channels=(32,), heads=4)
    for parameter in two.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    load_weights(four, two.state_dict())
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    assert not torch.allclose(two(x, t), four(x, t), atol=1e-3)
    with pytest.raises(ValueError, match="heads: 2 in the checkpoint, 4 in the network"):
        check_settings(two.settings, four)


# ---------------------------------------------------------------- files of other projects


class RunsCode:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_read_tensors_refuses_a_pickle_with_code(tmp_path):
    for name, content in {
        "bare": RunsCode(),
        "beside": {"weight": torch.ones(1), "callback": RunsCode()},
        "inside": {"state_dict": RunsCode()},
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=f"{name}.pt is damaged, or holds more than tensors"):
            read_tensors(tmp_path / f"{name}.pt")


def test_random_bytes_are_refused_with_one_line(tmp_path):
    """Two thirds of them begin like a pickle or a zip file."""
    rng = random.Random(0)
    for index in range(600):
        path = tmp_path / f"{index}.pt"
        start = (b"", b"\x80\x02", b"PK\x03\x04")[index % 3]
        path.write_bytes(start + rng.randbytes(rng.choice([1, 5, 30, 200])))
        for read in (read_tensors, open_tensors):
            with pytest.raises(ValueError, match=f"{index}.pt is damaged") as error:
                read(path)
            assert "\n" not in str(error.value)


def test_read_tensors_reads_both_formats_and_only_tensors(tmp_path):
    tensors = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "bare.pt")
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "nested.pt")
    torch.save(tensors | {"epoch": 3}, tmp_path / "mixed.pt")
    for name in ("a.safetensors", "bare.pt", "nested.pt", "mixed.pt"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        read_tensors(tmp_path / "missing.pt")


def test_open_tensors_reads_a_tensor_only_when_it_is_called(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        readers = open_tensors(tmp_path / name)
        assert readers.keys() == tensors.keys()
        assert not any(isinstance(read, torch.Tensor) for read in readers.values())
        assert torch.equal(readers["b"](), tensors["b"])


def test_an_autoencoder_of_version_1_is_loaded(tmp_path):
    """It names the argument image_channels otherwise."""
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), image_channels=1, blocks=1, scale=1.7, shift=0.2)
    save_autoencoder(tmp_path / "new", autoencoder)
    tree = load_tree(tmp_path / "new")
    tree["autoencoder"]["picture_channels"] = tree["autoencoder"].pop("image_channels")
    save_tree(tmp_path / "old", tree)
    for name in ("new", "old"):
        loaded = load_autoencoder(tmp_path / name)
        assert not loaded.training
        assert loaded.settings == autoencoder.settings
        assert (loaded.scale, loaded.shift) == (1.7, 0.2)
        for parameter, expected in zip(loaded.parameters(), autoencoder.parameters(), strict=True):
            assert torch.equal(parameter, expected)


def test_a_file_of_something_else_is_not_an_autoencoder(tmp_path):
    save_tree(tmp_path / "training", {"step": 1})
    with pytest.raises(ValueError, match="training is a checkpoint, but not one of an autoencoder"):
        load_autoencoder(tmp_path / "training")


def test_a_part_of_a_larger_tensor_is_read_by_its_offset_and_strides(tmp_path):
    """torch.save writes the whole storage once, and each tensor's place in it."""
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"part": whole[1:, ::2], "transposed": whole.T}, tmp_path / "a.pt")
    tensors = open_tensors(tmp_path / "a.pt")
    assert torch.equal(tensors["part"](), whole[1:, ::2])
    assert torch.equal(tensors["transposed"](), whole.T)
