import multiprocessing
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from easy_diffusion.networks.weights_io import load_weights
from easy_diffusion.training.checkpoint import link_or_copy, load_checkpoint, load_newest_checkpoint, save_checkpoint


def test_a_tree_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tree = {"layer": layer.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "phase": "sgd", "名": "番茄",
            "losses": [0.5, 0.25], "generator": torch.Generator().get_state(), "none": None, "yes": True,
            "empty": {}, "mixed": [1, "a", [2.5]]}
    save_checkpoint(tmp_path / "a.safetensors", tree)
    back = load_checkpoint(tmp_path / "a.safetensors")
    assert {k: v for k, v in back.items() if k not in ("layer", "optimizer", "generator")} == \
           {k: v for k, v in tree.items() if k not in ("layer", "optimizer", "generator")}
    assert torch.equal(back["generator"], tree["generator"])
    other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    other.load_state_dict(back["optimizer"])                # its keys are the integers that torch wants
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    a = torch.arange(6.0)
    save_checkpoint(tmp_path / "a", {"all": a, "part": a[2:4], "turned": a.view(2, 3).T})
    back = load_checkpoint(tmp_path / "a")
    assert back["part"].tolist() == [2, 3] and back["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a", {"step": 1})
    with pytest.raises(TypeError, match="'deep.thing' there is a object"):
        save_checkpoint(tmp_path / "a", {"step": 2, "deep": {"thing": object()}})
    def full(tensors, path, metadata):
        path.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("easy_diffusion.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "a", {"step": 2})
    assert load_checkpoint(tmp_path / "a") == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_foreign_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign.*not one that easy_diffusion wrote"):
        load_checkpoint(tmp_path / "foreign")
    save_checkpoint(tmp_path / "cut", {"a": torch.zeros(1000)})
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut is damaged"):
        load_checkpoint(tmp_path / "cut")


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="pickled is damaged or no safetensors"):
        load_checkpoint(tmp_path / "pickled")


def test_weights_of_another_shape_are_all_named_in_one_error():
    state = {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_weights(torch.nn.Linear(3, 2), state)
    for says in ("missing: bias (2,)", "unexpected: scale (1,)", "shape of weight: (3, 4) in the checkpoint, (2, 3) in the network"):
        assert says in str(error.value)


def test_a_whole_training_is_not_a_modules_weights():
    with pytest.raises(ValueError, match="not of a Linear's weights: at 'models' there is no tensor"):
        load_weights(torch.nn.Linear(1, 1), {"models": {}, "index": 3})


def test_what_a_killed_process_left_goes_with_the_next_writing(tmp_path):
    (tmp_path / "a.writing").mkdir()
    (tmp_path / "a.writing" / ".tmpXYZ").write_bytes(b"half a file")       # safetensors writes under a name of its own, too
    save_checkpoint(tmp_path / "a", {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and load_checkpoint(tmp_path / "a") == {"step": 1}


def test_the_last_ones_stay_and_take_each_others_place(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path / "a", {"step": step}, keep=3)
    assert {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()} == {"a": 4, "a.1": 3, "a.2": 2}
    link_or_copy(tmp_path / "a", tmp_path / "a.best")
    save_checkpoint(tmp_path / "a", {"step": 5}, keep=3)
    assert load_checkpoint(tmp_path / "a.best") == {"step": 4} and load_checkpoint(tmp_path / "a") == {"step": 5}


def test_where_nothing_but_the_best_is_whole_it_is_taken(tmp_path):
    for i in range(3):
        save_checkpoint(tmp_path / "c", {"step": i, "numbers": torch.zeros(100)}, keep=2, best=i == 0)
    for name in ("c", "c.1"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.warns(UserWarning, match="c.best"):
        assert load_newest_checkpoint(tmp_path / "c")["step"] == 0


def test_the_best_is_there_before_the_newest(tmp_path, monkeypatch):
    """A run that is killed between the two does that step again; it never remembers a best one that is not kept."""
    save_checkpoint(tmp_path / "c", {"step": 1}, keep=2, best=True)
    assert load_checkpoint(tmp_path / "c.best") == load_checkpoint(tmp_path / "c") == {"step": 1}
    replace = os.replace

    def killed(source, target):
        if target == tmp_path / "c":
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "c", {"step": 2}, keep=2, best=True)
    assert load_checkpoint(tmp_path / "c") == {"step": 1} and load_checkpoint(tmp_path / "c.best") == {"step": 2}


def test_a_checkpoint_cut_in_half_gives_way_to_the_one_before_and_does_not_push_it_out(tmp_path):
    for step in range(3):
        save_checkpoint(tmp_path / "a", {"step": step, "weights": torch.zeros(1000)}, keep=3)
    for name in ("a", "a.1"):                                               # the newest two
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2])
        with pytest.warns(UserWarning, match=r"a is damaged.*goes on from the checkpoint before it, .*a\.[12]$"):
            assert load_newest_checkpoint(tmp_path / "a")["step"] == (1 if name == "a" else 0)
    save_checkpoint(tmp_path / "a", {"step": 9}, keep=3)
    assert load_checkpoint(tmp_path / "a")["step"] == 9 and load_checkpoint(tmp_path / "a.2")["step"] == 0
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="a is damaged"):
        load_newest_checkpoint(tmp_path / "a")


def full_disk(path):
    """In a process of its own: files cannot grow beyond 10 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        save_checkpoint(path, {"step": 2, "weights": torch.zeros(100_000)}, keep=2)
    except OSError:
        os._exit(3)
    os._exit(0)


def test_a_disk_that_is_really_full_leaves_everything_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "a", {"step": 0}, keep=2)
    save_checkpoint(tmp_path / "a", {"step": 1}, keep=2)
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=full_disk, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()} == {"a": 1, "a.1": 0}
