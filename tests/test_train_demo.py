"""The command python -m easy_diffusion.train_demo: resuming, exported weights, options."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.lmdb_store import count_records
from easy_diffusion.networks.weights_io import load_tree
from easy_diffusion.presets import describe_training
from easy_diffusion.pretrained import load_model, model_path
from easy_diffusion.train_demo import main, parse_options
from easy_diffusion.training.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = ["--minutes", "0.15", "--dishes", "600", "--size", "32"]


def start_training(out, *arguments):
    """Start a small training in another process."""
    command = [
        sys.executable, "-u", "-m", "easy_diffusion.train_demo", *SMALL, *arguments,
        "--out", str(out),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(condition, process):
    """Wait until condition() is true; fail if the process ends before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, log of the last run, seconds of training after each interruption) of a training.

    It was killed at three moments, one of them during the training, and started again each time.
    """
    out = tmp_path_factory.mktemp("training") / "out"
    checkpoint = out / "model_32.safetensors"
    rng = random.Random(0)
    trained_seconds = []
    for moment in ("rendering", "training", "later"):
        process = start_training(out)
        if moment == "rendering":
            wait_until(lambda: count_records(out / "dishes_32") > 0, process)
        if moment == "training":
            wait_until(checkpoint.exists, process)
        time.sleep(rng.uniform(0, 1) + (5 if moment == "later" else 0))
        kill(process)
        seconds = load_checkpoint(checkpoint)["seconds"] if checkpoint.exists() else 0
        trained_seconds.append(seconds)
    process = start_training(out)
    log = process.communicate(timeout=200)[0]
    assert process.returncode == 0, log
    return out, log, trained_seconds


def test_a_killed_training_resumes_and_finishes(finished):
    out, log, trained_seconds = finished
    assert trained_seconds == sorted(trained_seconds)       # no saved training is lost
    assert count_records(out / "dishes_32") == 600
    assert load_checkpoint(out / "model_32.safetensors")["seconds"] >= 0.15 * 60
    # It resumed from a checkpoint, or the training was complete.
    first_step = re.search(r"step (\d+), loss", log)
    assert first_step is None or int(first_step[1]) > 0
    assert {path.name for path in out.iterdir()} == {
        "dishes_32", "model_32.safetensors", "held_out_32.png", "loss_32.png", "weights",
    }


def test_the_exported_model_is_the_trained_one_in_half_precision(finished):
    out, _, _ = finished
    saved = load_checkpoint(out / "model_32.safetensors")
    model = load_model(out / "weights")
    trained = torch.nn.ModuleDict({"network": model.network, "encoder": model.encoder})
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, saved["ema"][name].half().float()), name
    training = load_tree(model_path(out / "weights", 32))["training"]
    steps, minutes = training.pop("steps"), training.pop("minutes")
    assert steps == saved["index"]
    assert minutes == pytest.approx(saved["seconds"] / 60, abs=0.051)
    assert training == describe_training(600, 32, latent=False)


def test_a_finished_training_is_compared_with_other_weights(finished, tmp_path):
    """The sheet has a column more: ours, theirs, and drawn."""
    out, _, _ = finished
    index = load_checkpoint(out / "model_32.safetensors")["index"]
    width = Image.open(out / "held_out_32.png").size[0]
    assert main([*SMALL, "--out", str(out), "--weights", str(out / "weights")]) == 0
    assert load_checkpoint(out / "model_32.safetensors")["index"] == index
    assert Image.open(out / "held_out_32.png").size[0] > width * 1.3


def test_a_training_on_latents_resumes_and_starts_from_initial_weights(tmp_path):
    """It trains the autoencoder, encodes the dishes, and trains on latents. It is killed once.

    A second training of no more than a step starts from the weights of the first.
    """
    out = tmp_path / "out"
    arguments = ("--latent", "--dishes", "96", "--minutes", "0.1")
    process = start_training(out, *arguments)
    wait_until((out / "autoencoder_32.training.safetensors").exists, process)
    kill(process)
    process = start_training(out, *arguments)
    log = process.communicate(timeout=200)[0]
    assert process.returncode == 0, log
    assert "latents [16, 4, 4]" in log, log
    files = {path.name for path in out.iterdir()}
    files -= {name for name in files if name.endswith(".writing")}  # of the killed process
    assert files == {
        "dishes_32", "latents_32", "autoencoder_32.safetensors",
        "autoencoder_32.training.safetensors", "autoencoder_32.png",
        "model_32_latent.safetensors", "held_out_32_latent.png", "loss_32_latent.png", "weights",
    }
    first = load_model(out / "weights")
    assert first.autoencoder.factor == 8

    again = tmp_path / "again"
    arguments = [
        "--latent", "--dishes", "96", "--size", "32", "--minutes", "0.001", "--out", str(again)
    ]
    assert main([*arguments, "--initial-weights", str(out / "weights")]) == 0
    second = load_model(again / "weights")
    for name in ("network", "encoder", "autoencoder"):
        before = torch.cat([p.flatten() for p in getattr(first, name).parameters()])
        after = torch.cat([p.flatten() for p in getattr(second, name).parameters()])
        similarity = torch.nn.functional.cosine_similarity(before, after, dim=0)
        assert similarity > 0.95, name      # random weights would have a similarity below 0.5


@pytest.mark.parametrize("gpu, latent_batch, batch", [(False, 64, 32), (True, 512, 512)])
def test_defaults_suit_the_device(monkeypatch, gpu, latent_batch, batch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    options = parse_options(["--latent", "--minutes", "3"])
    assert (options.size, options.autoencoder_minutes) == (128, 3)
    assert options.batch_size == latent_batch
    assert parse_options([]).batch_size == batch
    assert parse_options([]).minutes == (2.5 if gpu else 10)


def test_invalid_options_are_named(capsys, tmp_path):
    for arguments in (
        ("--size", "60"),
        ("--minutes", "0"),
        ("--autoencoder-minutes", "0"),
        ("--dishes", "31"),
        ("--batch-size", "0"),
        ("--initial-weights", str(tmp_path / "missing")),
    ):
        with pytest.raises(SystemExit) as exit_info:
            parse_options(arguments)
        assert exit_info.value.code == 2
        assert all(argument in capsys.readouterr().err for argument in arguments[:1])
