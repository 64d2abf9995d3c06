import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, draw_dish
from datasets.latents_lmdb import encode_store
from datasets.lmdb_store import append_records
from easy_diffusion import presets
from easy_diffusion.evaluation.attribute_classifier import AttributeClassifier
from easy_diffusion.networks.unet import UNet
from easy_diffusion.train_model import build_network, main, parse_options, run_command
from easy_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from easy_diffusion.training.progress import read_rows

ROOT = Path(__file__).parents[1]
SMALL = ["--channels", "32", "--attention", "0", "--blocks", "1", "--text-dim", "32", "--batch-size", "4", "--precision", "no"]


def test_help_tells_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--help", "--multi", "--standalone", "--nproc"}
    options = {option for option in options if not option.startswith("--no-")}
    assert len(options) > 40 and text.count("(default: ") == len(options)


@pytest.mark.parametrize("wrong", [["--batch-size", "0"], ["--cn-clip", "x"], ["--prediction-type", "nothing"], ["--tensorboard"],
                                   ["--prediction-type", "velocity", "--timesteps", "importance"], ["--attention", "7"], ["--log-every", "0"],
                                   ["--learning-rate", "-1"], ["--batch-size", "abc"]])
def test_wrong_options_are_named(wrong, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        parse_options(wrong)
    assert stop.value.code == 2 and wrong[0].strip("-").replace("-", " ")[:10] in capsys.readouterr().err.replace("-", " ")


def test_drawn_dishes_with_a_table_and_samples_and_it_goes_on(tmp_path, capsys):
    arguments = [*SMALL, "--size", "32", "--dishes", "24", "--out", str(tmp_path), "--minutes", "0", "--log-every", "1", "--save-seconds", "0"]
    assert main([*arguments, "--steps", "3"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"dishes_32", "model.safetensors", "model.safetensors.1", "model.safetensors.2",
                                                          "model.safetensors.best", "log.csv", "log.png", "samples.png", "run.json"}
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size[0] > 6 * 32
    assert main([*arguments, "--steps", "5"]) == 0
    table = read_rows(tmp_path / "log.csv")
    assert [row["index"] for row in table] == ["0", "1", "2", "3", "4"] and all(float(row["loss"]) > 0 for row in table)
    assert load_checkpoint(tmp_path / "model.safetensors")["index"] == 5
    assert "24 pictures [3, 32, 32]" in capsys.readouterr().out


def test_a_network_that_learns_its_variance(tmp_path):
    assert main([*SMALL, "--size", "32", "--dishes", "24", "--out", str(tmp_path), "--minutes", "0", "--steps", "2", "--variance",
                 "learned_range", "--no-pooled", "--dropout", "0.1"]) == 0
    kept = load_checkpoint(tmp_path / "model.safetensors")["models"]
    assert len(kept["network.conv_out.bias"]) == 2 * 3 * 4 ** 2 and "network.pool.weight" not in kept


def test_a_flow(tmp_path):
    arguments = [*SMALL, "--size", "32", "--dishes", "24", "--out", str(tmp_path), "--minutes", "0", "--prediction-type", "velocity"]
    assert main([*arguments, "--steps", "2"]) == 0
    assert load_checkpoint(tmp_path / "model.safetensors")["prediction_type"] == "velocity" and (tmp_path / "samples.png").exists()
    with pytest.raises(ValueError, match="prediction_type: velocity, not x0"):
        main([*arguments[:-2], "--steps", "3"])
    with pytest.raises(ValueError, match="prediction_type: velocity, not x0"):
        main([*arguments[:-2], "--generate", "番茄汤"])


def test_a_run_of_another_kind_is_not_gone_on_with(tmp_path):
    for name in ("one", "two"):                                             # the same number of characters, and of weights
        caption = "番茄汤" if name == "one" else "清炒豆"
        for _ in append_records(tmp_path / name, [(torch.from_numpy(draw_dish("番茄汤", 32, i)), caption) for i in range(8)]):
            pass
    arguments = [*SMALL, "--out", str(tmp_path / "out"), "--sample-minutes", "0"]
    assert main([*arguments, "--data", str(tmp_path / "one"), "--steps", "1"]) == 0
    with pytest.raises(ValueError, match="other characters"):
        main([*arguments, "--data", str(tmp_path / "two"), "--steps", "2"])
    with pytest.raises(ValueError, match="schedule: cosine, not linear"):
        main([*arguments, "--data", str(tmp_path / "one"), "--steps", "2", "--schedule", "linear"])
    assert load_checkpoint(tmp_path / "out" / "model.safetensors")["index"] == 1


def test_at_a_terminal_what_cannot_be_is_told_in_a_sentence(monkeypatch, capsys):
    for error, status, sentence in ((ValueError("no such dish"), 2, "no such dish"), (KeyboardInterrupt(), 130, "goes on from its last")):
        monkeypatch.setattr("easy_diffusion.train_model.main", lambda error=error: (_ for _ in ()).throw(error))
        assert run_command() == status and sentence in capsys.readouterr().err


def test_what_was_learned_draws_names_and_a_run_at_its_end_says_so(tmp_path, capsys):
    arguments = [*SMALL, "--size", "32", "--dishes", "24", "--out", str(tmp_path), "--steps", "2", "--no-sgd", "--sample-minutes", "0"]
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        main([*arguments, "--generate", "番茄汤"])
    assert main(arguments) == 0 and "at its end already" not in capsys.readouterr().out
    before = (tmp_path / "model.safetensors").read_bytes()
    assert main([*arguments, "--generate", "番茄汤", "清炒土豆"]) == 0
    with Image.open(tmp_path / "generated.png") as sheet:
        assert sheet.size[0] > 2 * 32
    assert main(arguments) == 0 and "at its end already" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_steps_alone_set_no_limit_of_time_and_noise_has_no_weight_that_explodes():
    assert parse_options([]).minutes in (2.5, 10.0) and parse_options(["--steps", "5"]).minutes == 0
    assert parse_options(["--steps", "5", "--minutes", "3"]).minutes == 3
    assert (parse_options([]).loss_weight, parse_options(["--prediction-type", "eps"]).loss_weight) == ("velocity", "none")
    assert parse_options(["--prediction-type", "eps", "--loss-weight", "min-snr"]).loss_weight == "min-snr"


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("easy_diffusion.train_model.Accelerator", lambda **_: types.SimpleNamespace(num_processes=1))
    with pytest.raises(SystemExit, match="ACCELERATE_USE_CPU=true"):
        main([])


def test_the_networks_of_the_house_can_be_asked_for():
    first = "--channels 128 128 128 256 256 512 512 --attention 2 3 4 --blocks 1 --heads 4 --text-dim 768 --no-pooled --patch 1"
    assert first in (ROOT / "easy_diffusion" / "train_model.py").read_text()
    network, *_ = build_network(parse_options(first.split()), (3, 128, 128), types.SimpleNamespace(dim=768))
    assert str(network) == str(UNet.easy_diffusion_2023())
    demo, *_ = build_network(parse_options([]), (3, 64, 64), types.SimpleNamespace(dim=128))
    assert str(demo) == str(presets.build_networks("番茄")[0])


def test_photographs_a_store_and_latents_are_told_apart(tmp_path):
    names = ["番茄汤", "清炒土豆", "番茄炒鸡蛋", "牛肉面"] * 2
    for i, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_dish(name, 48, i).transpose(1, 2, 0)).save(tmp_path / "photos" / name / f"{i}.png")
    for _ in append_records(tmp_path / "store", [(torch.from_numpy(draw_dish(name, 32, i)), name) for i, name in enumerate(names)]):
        pass

    def encode(pictures):
        small = torch.nn.functional.avg_pool2d(pictures.float() / 127.5 - 1, 4)
        return torch.cat([small, small[:, :1]], dim=1), torch.zeros(len(small), 4, 8, 8)
    for _ in encode_store(tmp_path / "store", tmp_path / "latents", encode, "a mean"):
        pass
    for data, shape in (("photos", (3, 32, 32)), ("store", (3, 32, 32)), ("latents", (4, 8, 8))):
        out = tmp_path / f"out of {data}"
        assert main([*SMALL, "--data", str(tmp_path / data), "--size", "32", "--out", str(out), "--steps", "2", "--sample-minutes", "0"]) == 0
        network = load_checkpoint(out / "model.safetensors")["models"]
        patch = 4 if shape[0] == 3 else 1
        assert network["network.conv_in.weight"].shape[1] == shape[0] * patch ** 2 and len(read_rows(out / "log.csv")) == 2


def test_the_largest_batch_is_asked_for(tmp_path, monkeypatch):
    """A network in a memory for four pictures: in two pieces eight fit, in as many as it takes twice as many would."""
    forward = UNet.forward

    def narrow(self, x_t, *others):
        if len(x_t) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x_t, *others)
    monkeypatch.setattr(UNet, "forward", narrow)
    arguments = [*SMALL, "--batch-size", "auto", "--size", "32", "--dishes", "24", "--out", str(tmp_path), "--sample-minutes", "0"]
    assert main([*arguments, "--micro-batches", "2", "--steps", "1"]) == 0
    assert load_checkpoint(tmp_path / "model.safetensors")["images_per_step"] == 8
    assert main([*arguments, "--micro-batches", "4", "--steps", "2"]) == 0         # it goes on with as many
    kept = load_checkpoint(tmp_path / "model.safetensors")
    assert kept["images_per_step"] == 8 and kept["index"] == 2
    with pytest.raises(ValueError, match="with 8 pictures a step, not 4"):
        main([*arguments, "--batch-size", "4", "--steps", "3"])


def test_long_captions_are_read(tmp_path):
    for _ in append_records(tmp_path / "store", [(torch.from_numpy(draw_dish("番茄汤", 32, i)), "long " * 20) for i in range(8)]):
        pass
    assert main([*SMALL, "--data", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--steps", "1", "--sample-minutes", "0"]) == 0


def test_a_reader_of_dishes_says_at_once_that_it_does_not_know_other_names(tmp_path):
    for _ in append_records(tmp_path / "store", [(torch.from_numpy(draw_dish("番茄汤", 32, i)), "a cat") for i in range(8)]):
        pass
    save_checkpoint(tmp_path / "reader", AttributeClassifier(INGREDIENTS, WAYS).state_dict())
    with pytest.raises(ValueError, match="a cat"):
        main([*SMALL, "--data", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--steps", "1",
              "--classifier", str(tmp_path / "reader")])
    assert not (tmp_path / "out").exists()


def test_it_can_be_launched_as_two_processes(tmp_path):
    """By torchrun, which is also what accelerate launches the processes of several GPUs by."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                           "-m", "easy_diffusion.train_model", *SMALL, "--size", "32", "--dishes", "24", "--out", str(tmp_path),
                           "--steps", "3", "--sample-minutes", "0"],
                          cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert "2 × 4 pictures a step" in done.stdout and load_checkpoint(tmp_path / "model.safetensors")["index"] == 3
