"""The command that trains a ControlNet, as its user calls it."""

import pytest
import torch
from PIL import Image

from easy_diffusion import train_control
from easy_diffusion.command_line import run_command
from easy_diffusion.networks.controlnet import load_controlnet
from easy_diffusion.pretrained import load_model
from easy_diffusion.train_control import main

SHORT = ["--minutes", "0.02", "--dishes", "20", "--batch-size", "4", "--size", "32"]


def test_it_trains_saves_and_shows_a_controlnet(random_weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_control, "SHOWN", 2)
    arguments = [*SHORT, "--weights", str(random_weights), "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "controlnet_parts_32.safetensors"
    unet = load_model(random_weights, 32).network
    controlnet, note = load_controlnet(path, unet)
    assert note == "parts" and controlnet.control_channels == 4
    assert any(zero.weight.abs().max() > 0 for zero in controlnet.zero_convs)
    with Image.open(tmp_path / "controlled_parts_32.png") as sheet:
        assert sheet.width > 2 * 4 * 32
    assert capsys.readouterr().out.count("wrote") == 2

    # The same command does not train again.
    before = controlnet.state_dict()
    assert main(arguments) == 0
    again = load_controlnet(path, unet)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_a_model_of_latents_is_refused(random_weights, tmp_path, capsys):
    arguments = ["--size", "64", "--weights", str(random_weights), "--out", str(tmp_path)]
    assert run_command(lambda: main(arguments)) == 2
    assert "works on latents" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--control", "depth"], ["--minutes", "0"], ["--dishes", "3"], ["--size", "63"]]
)
def test_wrong_options_end_with_a_message(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err
