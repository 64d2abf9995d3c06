import multiprocessing
import os
import resource
import signal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.networks.weights_io import load_weights, read_tensors
from easy_diffusion.training.checkpoint import (
    link_or_copy,
    load_checkpoint,
    load_ema_weights,
    load_newest_checkpoint,
    save_checkpoint,
)
from easy_diffusion.training.trainer import train


def truncate(path):
    """Keep the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def saved_steps(folder):
    """File name → the value of "step" in the checkpoint."""
    return {path.name: load_checkpoint(path)["step"] for path in folder.iterdir()}


# ---------------------------------------------------------------- what is saved is loaded


def test_a_loaded_tree_equals_the_saved_one(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    plain = {
        "step": 7,
        "phase": "sgd",
        "名": "番茄",
        "losses": [0.5, 0.25],
        "none": None,
        "yes": True,
        "empty": {},
        "mixed": [1, "a", [2.5]],
    }
    with_tensors = {
        "layer": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": torch.Generator().get_state(),
    }
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, plain | with_tensors)
    loaded = load_checkpoint(path)
    assert {key: loaded[key] for key in loaded if key not in with_tensors} == plain
    assert torch.equal(loaded["generator"], with_tensors["generator"])

    other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    other.load_state_dict(loaded["optimizer"])      # its keys are integers, as torch needs them
    expected = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], expected)
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_share_memory_are_all_saved(tmp_path):
    a = torch.arange(6.0)
    save_checkpoint(tmp_path / "a", {"all": a, "part": a[2:4], "transposed": a.view(2, 3).T})
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded["part"].tolist() == [2, 3]
    assert loaded["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]


# ---------------------------------------------------------------- files that are refused


def test_incompatible_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "incompatible")
    with pytest.raises(ValueError, match="incompatible.*not one that easy_diffusion wrote"):
        load_checkpoint(tmp_path / "incompatible")
    save_checkpoint(tmp_path / "cut", {"a": torch.zeros(1000)})
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut is damaged"):
        load_checkpoint(tmp_path / "cut")


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="pickled is damaged or no safetensors"):
        load_checkpoint(tmp_path / "pickled")


def test_all_mismatches_between_weights_and_module_are_named_in_one_error():
    state = {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_weights(torch.nn.Linear(3, 2), state)
    message = str(error.value)
    assert "missing: bias (2,)" in message
    assert "unexpected: scale (1,)" in message
    assert "shape of weight: (3, 4) in the checkpoint, (2, 3) in the network" in message


def test_a_checkpoint_of_a_training_is_not_the_weights_of_a_module():
    message = "not of a Linear's weights: at 'models' there is no tensor"
    with pytest.raises(ValueError, match=message):
        load_weights(torch.nn.Linear(1, 1), {"models": {}, "index": 3})


# ---------------------------------------------------------------- writing that fails


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a", {"step": 1})
    with pytest.raises(TypeError, match="'deep.thing' there is a value of type object"):
        save_checkpoint(tmp_path / "a", {"step": 2, "deep": {"thing": object()}})

    def save_to_full_disk(tensors, path, metadata):
        path.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("easy_diffusion.networks.weights_io.save_file", save_to_full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "a", {"step": 2})
    assert saved_steps(tmp_path) == {"a": 1}


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    (tmp_path / "a.writing").mkdir()
    # safetensors writes to a temporary name of its own, too.
    (tmp_path / "a.writing" / ".tmpXYZ").write_bytes(b"half a file")
    save_checkpoint(tmp_path / "a", {"step": 1})
    assert saved_steps(tmp_path) == {"a": 1}


def save_to_limited_disk(path):
    """Runs in a process of its own: files cannot grow beyond 10 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        save_checkpoint(path, {"step": 2, "weights": torch.zeros(100_000)}, keep=2)
    except OSError:
        os._exit(3)
    os._exit(0)


def test_a_disk_that_is_really_full_leaves_all_checkpoints_unchanged(tmp_path):
    save_checkpoint(tmp_path / "a", {"step": 0}, keep=2)
    save_checkpoint(tmp_path / "a", {"step": 1}, keep=2)
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    process = context.Process(target=save_to_limited_disk, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert saved_steps(tmp_path) == {"a": 1, "a.1": 0}


# ---------------------------------------------------------------- previous and best checkpoints


def test_the_last_checkpoints_are_kept_and_renumbered(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path / "a", {"step": step}, keep=3)
    assert saved_steps(tmp_path) == {"a": 4, "a.1": 3, "a.2": 2}
    link_or_copy(tmp_path / "a", tmp_path / "a.best")
    save_checkpoint(tmp_path / "a", {"step": 5}, keep=3)
    assert load_checkpoint(tmp_path / "a.best") == {"step": 4}
    assert load_checkpoint(tmp_path / "a") == {"step": 5}


def test_the_best_is_loaded_if_all_others_are_damaged(tmp_path):
    for step in range(3):
        tree = {"step": step, "weights": torch.zeros(100)}
        save_checkpoint(tmp_path / "c", tree, keep=2, best=step == 0)
    for name in ("c", "c.1"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.warns(UserWarning, match="c.best"):
        assert load_newest_checkpoint(tmp_path / "c")["step"] == 0


def test_the_best_is_written_before_the_newest(tmp_path, monkeypatch):
    """A run that is killed in between repeats the step; never is a best one recorded but not kept.
    """
    save_checkpoint(tmp_path / "c", {"step": 1}, keep=2, best=True)
    assert load_checkpoint(tmp_path / "c.best") == {"step": 1}
    assert load_checkpoint(tmp_path / "c") == {"step": 1}
    replace = os.replace

    def kill_at_newest(source, target):
        if target == tmp_path / "c":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill_at_newest)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "c", {"step": 2}, keep=2, best=True)
    assert load_checkpoint(tmp_path / "c") == {"step": 1}
    assert load_checkpoint(tmp_path / "c.best") == {"step": 2}


def test_a_truncated_checkpoint_is_replaced_by_the_previous_one_and_does_not_displace_it(tmp_path):
    for step in range(3):
        save_checkpoint(tmp_path / "a", {"step": step, "weights": torch.zeros(1000)}, keep=3)
    message = r"a is damaged.*resumes from an earlier checkpoint, .*a\.[12]$"
    for name, expected in (("a", 1), ("a.1", 0)):
        truncate(tmp_path / name)
        with pytest.warns(UserWarning, match=message):
            assert load_newest_checkpoint(tmp_path / "a")["step"] == expected
    save_checkpoint(tmp_path / "a", {"step": 9}, keep=3)
    assert load_checkpoint(tmp_path / "a")["step"] == 9
    assert load_checkpoint(tmp_path / "a.2")["step"] == 0
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="a is damaged"):
        load_newest_checkpoint(tmp_path / "a")


def test_random_bytes_inside_the_tensors_are_found_by_the_checksum(tmp_path):
    """The file still has the right length and a readable header."""
    for step in range(2):
        tree = {"step": step, "weights": torch.zeros(10_000, dtype=torch.bfloat16)}
        save_checkpoint(tmp_path / "a", tree, keep=2)
    content = bytearray((tmp_path / "a").read_bytes())
    content[-8000:-4000] = os.urandom(4000)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a is damaged: the checksum"):
        load_checkpoint(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"a is damaged.*earlier checkpoint, .*a\.1"):
        assert load_newest_checkpoint(tmp_path / "a")["step"] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists the maps")
def test_a_loaded_file_does_not_stay_mapped(tmp_path):
    """Windows cannot replace a mapped file."""
    path = tmp_path / "mapped.safetensors"
    save_checkpoint(path, {"weights": torch.zeros(1000, 1000)})
    for load in (load_checkpoint, read_tensors):
        loaded = load(path)
        assert path.name not in open("/proc/self/maps", encoding="utf-8").read()
        assert loaded


# ---------------------------------------------------------------- which network it belongs to


def build_models(heads=2, prediction_type="v"):
    """A small UNet, its encoder, a diffusion."""
    encoder = CharacterEncoder("红黑", dim=16, layers=1)
    network = UNet(channels=(32,), blocks=1, context_dim=16, heads=heads)
    return network, encoder, GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type)


def train_one_step(checkpoint, network, encoder, diffusion, steps=1):
    """Train on one batch of two images, and save the checkpoint."""
    batch = torch.zeros(2, 3, 8, 8), ["红", "黑"]
    accelerator = Accelerator(mixed_precision="no")
    return list(train(
        network, diffusion, [batch] * 2, encoder,
        steps=steps, checkpoint=checkpoint, accelerator=accelerator,
    ))


def test_a_network_with_other_heads_refuses_the_checkpoint_and_names_the_heads(tmp_path):
    path = tmp_path / "model"
    train_one_step(path, *build_models(heads=2))
    saved = load_checkpoint(path)
    message = "heads: 2 in the checkpoint, 4 in the network"
    with pytest.raises(ValueError, match=message):
        load_ema_weights(*build_models(heads=4), saved)
    with pytest.raises(ValueError, match=message):
        train_one_step(path, *build_models(heads=4), steps=2)
    load_ema_weights(*build_models(heads=2), saved)
    assert len(train_one_step(path, *build_models(heads=2), steps=2)) == 1


def test_another_prediction_type_is_refused_when_weights_are_loaded(tmp_path):
    train_one_step(tmp_path / "model", *build_models())
    with pytest.raises(ValueError, match="trained to predict v, not x0"):
        load_ema_weights(*build_models(prediction_type="x0"), load_checkpoint(tmp_path / "model"))


def test_a_checkpoint_without_settings_is_loaded_as_before(tmp_path):
    train_one_step(tmp_path / "model", *build_models(heads=2))
    saved = load_checkpoint(tmp_path / "model")
    del saved["network_settings"]
    network, encoder, diffusion = build_models(heads=2)
    load_ema_weights(network, encoder, diffusion, saved)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor.cpu(), saved["ema"][f"network.{name}"])
