"""The command python -m easy_diffusion.train_model: options, resuming, datasets, batch size."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
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
from easy_diffusion.train_model import main
from easy_diffusion.train_options import RANGES, parse_options
from easy_diffusion.train_setup import build_network
from easy_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from easy_diffusion.training.progress import read_rows

ROOT = Path(__file__).parents[1]
SMALL_NETWORK = [
    "--channels", "32", "--attention", "0", "--blocks", "1", "--text-dim", "32",
    "--batch-size", "4", "--precision", "no",
]
SMALL_DISHES = ["--size", "32", "--dishes", "24"]



def write_store(folder, captions):
    """Write an LMDB store of drawn dishes of 32×32 pixels with these captions."""
    images = [torch.from_numpy(draw_dish("番茄汤", 32, seed)) for seed in range(len(captions))]
    for _ in append_records(folder, list(zip(images, captions))):
        pass


# ------------------------------------------------------------------ options


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = set(re.findall(r"(--[a-z][a-z-]+)", text))
    options -= {"--help", "--multi", "--standalone", "--nproc"}
    options = {option for option in options if not option.startswith("--no-")}
    assert len(options) > 40
    assert text.count("(default: ") == len(options)


@pytest.mark.parametrize("arguments", [
    ["--batch-size", "0"],
    ["--batch-size", "abc"],
    ["--cn-clip", "x"],
    ["--prediction-type", "unknown"],
    ["--tensorboard"],
    ["--prediction-type", "velocity", "--timesteps", "importance"],
    ["--attention", "7"],
    ["--log-every", "0"],
    ["--learning-rate", "-1"],
    ["--clip", "-1"],
    ["--minutes", "nan"],
    ["--minutes", "inf"],
    ["--caption-dropout", "5"],
    ["--ema", "-3"],
    ["--ema", "1"],
    ["--decay", "-1"],
    ["--weight-decay", "-0.1"],
    ["--guidance", "nan"],
    ["--spike", "nan"],
    ["--text-dim", "7"],
    ["--patch", "-1"],
    ["--channels", "33", "64"],
    ["--heads", "7"],
    ["--size", "36"],
    ["--batch-size", "1000000000"],
    ["--classifier", "/nowhere"],
    ["--autoencoder", "/nowhere"],
    ["--data", "/nowhere"],
    ["--generate", "番茄汤", "--out", "/nowhere"],
    ["--keep", "0"],
    ["--seed", "-1"],
    ["--workers", "-2"],
])
def test_an_invalid_option_is_named_in_the_error(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit) as exit_info:
        parse_options(arguments)
    assert exit_info.value.code == 2
    option = arguments[0].strip("-").replace("-", " ")
    assert option[:10] in capsys.readouterr().err.replace("-", " ")


def test_every_number_has_a_range():
    """A new option with a number must get an entry in RANGES, or be checked by itself."""
    options = vars(parse_options([]))
    numbers = {
        name for name, value in options.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert numbers - RANGES.keys() == {"spike"} | ({"batch_size"} & numbers)


def test_steps_without_minutes_set_no_time_limit():
    assert parse_options([]).minutes in (2.5, 10.0)
    assert parse_options(["--steps", "5"]).minutes == 0
    assert parse_options(["--steps", "5", "--minutes", "3"]).minutes == 3


def test_the_default_loss_weight_of_eps_is_none():
    assert parse_options([]).loss_weight == "velocity"
    assert parse_options(["--prediction-type", "eps"]).loss_weight == "none"
    options = parse_options(["--prediction-type", "eps", "--loss-weight", "min-snr"])
    assert options.loss_weight == "min-snr"


def test_the_options_in_the_docstring_build_the_network_of_the_first_version():
    arguments = (
        "--channels 128 128 128 256 256 512 512 --attention 2 3 4 --blocks 1 --heads 4 "
        "--text-dim 768 --no-pooled --patch 1"
    )
    source = (ROOT / "easy_diffusion" / "train_model.py").read_text("utf-8")
    assert arguments in " ".join(source.split())
    options = parse_options(arguments.split())
    network, *_ = build_network(options, (3, 128, 128), types.SimpleNamespace(dim=768))
    assert str(network) == str(UNet.easy_diffusion_2023())


def test_the_default_options_build_the_network_of_the_demo():
    encoder = types.SimpleNamespace(dim=128)
    network, *_ = build_network(parse_options([]), (3, 64, 64), encoder)
    assert str(network) == str(presets.build_networks("番茄")[0])


# ------------------------------------------------------------------ training and resuming


def test_training_on_drawn_dishes_writes_all_files_and_resumes(tmp_path, capsys):
    arguments = [
        *SMALL_NETWORK, *SMALL_DISHES, "--out", str(tmp_path), "--minutes", "0",
        "--log-every", "1", "--save-seconds", "0",
    ]
    assert main([*arguments, "--steps", "3"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "dishes_32", "model.safetensors", "model.safetensors.1", "model.safetensors.2",
        "model.safetensors.best", "log.csv", "log.png", "samples.png", "run.json",
    }
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size[0] > 6 * 32
    assert main([*arguments, "--steps", "5"]) == 0
    rows = read_rows(tmp_path / "log.csv")
    assert [row["index"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert all(float(row["loss"]) > 0 for row in rows)
    assert load_checkpoint(tmp_path / "model.safetensors")["index"] == 5
    assert "24 images [3, 32, 32]" in capsys.readouterr().out


def test_a_learned_variance_doubles_the_output_channels(tmp_path):
    status = main([
        *SMALL_NETWORK, *SMALL_DISHES, "--out", str(tmp_path), "--minutes", "0", "--steps", "2",
        "--variance", "learned_range", "--no-pooled", "--dropout", "0.1",
    ])
    assert status == 0
    weights = load_checkpoint(tmp_path / "model.safetensors")["models"]
    assert len(weights["network.conv_out.bias"]) == 2 * 3 * 4 ** 2
    assert "network.pool.weight" not in weights


def test_a_flow_trains_and_is_not_resumed_as_a_diffusion(tmp_path):
    arguments = [*SMALL_NETWORK, *SMALL_DISHES, "--out", str(tmp_path), "--minutes", "0"]
    assert main([*arguments, "--prediction-type", "velocity", "--steps", "2"]) == 0
    saved = load_checkpoint(tmp_path / "model.safetensors")
    assert saved["prediction_type"] == "velocity"
    assert (tmp_path / "samples.png").exists()
    with pytest.raises(ValueError, match="prediction_type: velocity, not x0"):
        main([*arguments, "--steps", "3"])
    with pytest.raises(ValueError, match="prediction_type: velocity, not x0"):
        main([*arguments, "--generate", "番茄汤"])


def test_an_incompatible_run_is_not_resumed(tmp_path):
    # Both stores have the same number of characters, so the networks have the same shapes.
    write_store(tmp_path / "one", ["番茄汤"] * 8)
    write_store(tmp_path / "two", ["清炒豆"] * 8)
    arguments = [*SMALL_NETWORK, "--out", str(tmp_path / "out"), "--sample-minutes", "0"]
    one = ["--data", str(tmp_path / "one")]
    two = ["--data", str(tmp_path / "two")]
    assert main([*arguments, *one, "--steps", "1"]) == 0
    with pytest.raises(ValueError, match="other characters"):
        main([*arguments, *two, "--steps", "2"])
    with pytest.raises(ValueError, match="schedule: cosine, not linear"):
        main([*arguments, *one, "--steps", "2", "--schedule", "linear"])
    assert load_checkpoint(tmp_path / "out" / "model.safetensors")["index"] == 1


def test_a_run_goes_on_with_other_hyperparameters_or_data_only_if_that_is_allowed(tmp_path):
    for seed, store in enumerate(("one", "two")):
        image = torch.from_numpy(draw_dish("番茄汤", 32, seed))
        for _ in append_records(tmp_path / store, [(image, "番茄汤")] * 8):
            pass
    arguments = [*SMALL_NETWORK, "--out", str(tmp_path / "out"), "--sample-minutes", "0"]
    one = ["--data", str(tmp_path / "one")]
    two = ["--data", str(tmp_path / "two")]
    assert main([*arguments, *one, "--steps", "1"]) == 0
    with pytest.raises(ValueError, match="data: 8-.*, not 8-.*--allow-changes"):
        main([*arguments, *two, "--steps", "2"])
    changed = [*one, "--weight-decay", "0.1", "--ema", "0.9"]
    with pytest.raises(ValueError, match="ema: 0.998, not 0.9; weight_decay: 0.01, not 0.1"):
        main([*arguments, *changed, "--steps", "2"])
    assert load_checkpoint(tmp_path / "out" / "model.safetensors")["index"] == 1
    with pytest.warns(UserWarning, match="started with ema: 0.998, not 0.9"):
        assert main([*arguments, *changed, "--steps", "2", "--allow-changes"]) == 0
    assert main([*arguments, *changed, "--steps", "3"]) == 0
    assert load_checkpoint(tmp_path / "out" / "model.safetensors")["index"] == 3


def test_images_that_are_not_square_are_trained_on_and_generated(tmp_path):
    image = torch.from_numpy(draw_dish("番茄汤", 48, 0))[:, :32]                # [3, 32, 48]
    for _ in append_records(tmp_path / "store", [(image, "番茄汤")] * 8):
        pass
    arguments = [
        *SMALL_NETWORK, "--data", str(tmp_path / "store"), "--out", str(tmp_path / "out"),
        "--steps", "2",
    ]
    assert main(arguments) == 0
    assert main([*arguments, "--generate", "番茄汤"]) == 0
    with Image.open(tmp_path / "out" / "generated.png") as sheet:
        pixels = np.asarray(sheet)
    rows = np.flatnonzero((pixels[:128] < 255).any(axis=(1, 2)))
    assert len(rows) < 110                          # 128 · 32 / 48 = 85, not 128


def test_a_damaged_run_json_is_named(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{", "utf-8")
    with pytest.raises(SystemExit):
        main([*SMALL_NETWORK, "--out", str(tmp_path)])
    assert "run.json is damaged" in capsys.readouterr().err


def test_long_captions_are_cut_and_counted(tmp_path):
    write_store(tmp_path / "store", ["番" * 3000] * 2 + ["番茄汤"] * 6)
    arguments = [*SMALL_NETWORK, "--data", str(tmp_path / "store"), "--sample-minutes", "0"]
    with pytest.warns(UserWarning, match="2 of 8 captions are cut after 127 characters"):
        assert main([*arguments, "--out", str(tmp_path / "out"), "--steps", "2"]) == 0


def test_generate_uses_the_trained_network_and_a_finished_run_says_so(tmp_path, capsys):
    arguments = [
        *SMALL_NETWORK, *SMALL_DISHES, "--out", str(tmp_path), "--steps", "2", "--no-sgd",
        "--sample-minutes", "0",
    ]
    with pytest.raises(SystemExit):
        main([*arguments, "--generate", "番茄汤"])
    assert main(arguments) == 0
    assert "already finished" not in capsys.readouterr().out
    checkpoint = (tmp_path / "model.safetensors").read_bytes()
    assert main([*arguments, "--generate", "番茄汤", "清炒土豆"]) == 0
    with Image.open(tmp_path / "generated.png") as sheet:
        assert sheet.size[0] > 2 * 32
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == checkpoint


# ------------------------------------------------------------------ datasets


@pytest.mark.parametrize("content, message", [
    (None, "no Chinese CLIP at"), (b"not a checkpoint", "X"),
])
def test_chinese_clip_is_opened_before_the_data(tmp_path, capsys, content, message):
    write_store(tmp_path / "store", ["番茄汤"] * 8)
    if content is not None:
        (tmp_path / "clip.pt").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "store"), "--cn-clip", str(tmp_path / "clip.pt")])
    assert message in capsys.readouterr().err

def test_photographs_a_store_and_latents_are_distinguished(tmp_path):
    names = ["番茄汤", "清炒土豆", "番茄炒鸡蛋", "牛肉面"] * 2
    for i, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(draw_dish(name, 48, i).transpose(1, 2, 0))
        image.save(tmp_path / "photos" / name / f"{i}.png")
    write_store(tmp_path / "store", names)

    def encode(images):
        mean = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 4)    # [B, 3, 8, 8]
        mean = torch.cat([mean, mean[:, :1]], dim=1)                            # [B, 4, 8, 8]
        return mean, torch.zeros(len(mean), 4, 8, 8)

    for _ in encode_store(tmp_path / "store", tmp_path / "latents", encode, "a mean"):
        pass
    for data, channels, patch in (("photos", 3, 4), ("store", 3, 4), ("latents", 4, 1)):
        out = tmp_path / f"out of {data}"
        status = main([
            *SMALL_NETWORK, "--data", str(tmp_path / data), "--size", "32", "--out", str(out),
            "--steps", "2", "--sample-minutes", "0",
        ])
        assert status == 0
        weights = load_checkpoint(out / "model.safetensors")["models"]
        assert weights["network.conv_in.weight"].shape[1] == channels * patch ** 2
        assert len(read_rows(out / "log.csv")) == 2
    with pytest.raises(ValueError, match="latents: --generate needs --autoencoder"):
        main([
            *SMALL_NETWORK, "--data", str(tmp_path / "latents"), "--out", str(out), "--size", "32",
            "--generate", "番茄汤", "--allow-changes",
        ])


def test_long_captions_are_encoded(tmp_path):
    write_store(tmp_path / "store", ["long " * 20] * 8)
    assert main([
        *SMALL_NETWORK, "--data", str(tmp_path / "store"), "--out", str(tmp_path / "out"),
        "--steps", "1", "--sample-minutes", "0",
    ]) == 0


def test_a_classifier_of_dishes_rejects_other_captions_before_training(tmp_path):
    write_store(tmp_path / "store", ["a cat"] * 8)
    classifier = AttributeClassifier(INGREDIENTS, WAYS)
    save_checkpoint(tmp_path / "classifier", classifier.state_dict())
    with pytest.raises(ValueError, match="a cat"):
        main([
            *SMALL_NETWORK, "--data", str(tmp_path / "store"), "--out", str(tmp_path / "out"),
            "--steps", "1", "--classifier", str(tmp_path / "classifier"),
        ])
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------ memory, processes, errors


def test_batch_size_auto_takes_the_largest_batch_that_fits(tmp_path, monkeypatch):
    """With memory for four images at a time, two micro-batches hold eight images.

    A resumed run keeps this batch size, even with more micro-batches.
    """
    forward = UNet.forward

    def forward_up_to_four(self, x_t, *others):
        if len(x_t) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x_t, *others)

    monkeypatch.setattr(UNet, "forward", forward_up_to_four)
    arguments = [
        *SMALL_NETWORK, "--batch-size", "auto", *SMALL_DISHES, "--out", str(tmp_path),
        "--sample-minutes", "0",
    ]
    assert main([*arguments, "--micro-batches", "2", "--steps", "1"]) == 0
    assert load_checkpoint(tmp_path / "model.safetensors")["images_per_step"] == 8
    assert main([*arguments, "--micro-batches", "4", "--steps", "2"]) == 0
    saved = load_checkpoint(tmp_path / "model.safetensors")
    assert saved["images_per_step"] == 8
    assert saved["index"] == 2
    with pytest.raises(ValueError, match="with 8 .* not 4"):
        main([*arguments, "--batch-size", "4", "--steps", "3"])


def test_unconnected_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    accelerator = types.SimpleNamespace(num_processes=1)
    monkeypatch.setattr("easy_diffusion.train_model.Accelerator", lambda **_: accelerator)
    with pytest.raises(SystemExit, match="ACCELERATE_USE_CPU=true"):
        main([])


def test_torchrun_launches_two_processes(tmp_path):
    """`accelerate launch` starts the processes of several GPUs in the same way."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "-m", "easy_diffusion.train_model", *SMALL_NETWORK, *SMALL_DISHES, "--out", str(tmp_path),
        "--steps", "3", "--sample-minutes", "0",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "2 × 4 images per step" in result.stdout
    assert load_checkpoint(tmp_path / "model.safetensors")["index"] == 3
