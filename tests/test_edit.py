"""The command that edits, as its user calls it."""

import pytest
import torch
from PIL import Image

from datasets.dishes import draw_dish
from easy_diffusion import edit
from easy_diffusion.command_line import run_command
from easy_diffusion.edit import main, parse_options
from easy_diffusion.pretrained import load_model

SOURCE, TARGET = "番茄炒鸡蛋", "番茄炒豆腐"


@pytest.fixture
def arguments(random_weights, tmp_path):
    return ["--to", TARGET, "--steps", "4", "--weights", str(random_weights), "--out",
            str(tmp_path)]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "dish.png"
    Image.fromarray(draw_dish(SOURCE, 64, 0).transpose(1, 2, 0)).save(path)
    return str(path)


@pytest.mark.parametrize("size", ["32", "64"])
@pytest.mark.parametrize("method", edit.METHODS)
def test_a_generated_dish_is_edited_on_pixels_and_on_latents(arguments, tmp_path, method, size):
    assert main([SOURCE, "--method", method, "--size", size, *arguments]) == 0
    with Image.open(tmp_path / f"{SOURCE}_to_{TARGET}.png") as sheet:
        assert sheet.width > 2 * edit.SHOWN


@pytest.mark.parametrize("more", [["--method", "sdedit"], ["--from", SOURCE]])
def test_an_image_is_edited(arguments, tmp_path, photo, more, capsys):
    assert main([photo, "--size", "32", *more, *arguments]) == 0
    assert f"dish_to_{TARGET}.png" in capsys.readouterr().out


def test_an_edit_to_the_same_caption_gives_the_source(arguments, random_weights):
    options = parse_options([SOURCE, *arguments, "--size", "32", "--to", SOURCE])
    source, result = edit.edit(options, load_model(random_weights, 32))
    torch.testing.assert_close(source, result, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--cross", "2"], "--cross"),
        (["--strength", "0"], "--strength"),
        (["--method", "magic"], "--method"),
        (["--method", "sdedit", "--strength", "0.1"], "must be at least 0.25"),
        (["--from", TARGET], "--from is for an image file"),
        (["--to", ""], "a caption has characters"),
        (["--to", "番茄/豆腐"], "not '番茄/豆腐'"),
    ],
)
def test_wrong_options_end_with_a_message(arguments, wrong, message, capsys):
    with pytest.raises(SystemExit):
        main([SOURCE, *arguments, *wrong])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message", [([], "needs the caption of the image: --from"),
                      (["--method", "regional", "--from", SOURCE], "does not take one")],
)
def test_what_an_image_needs_is_said(arguments, photo, more, message, capsys):
    with pytest.raises(SystemExit):
        main([photo, *arguments, *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("source", ["missing.jpg", "番茄/豆腐", "."])
def test_a_missing_image_is_not_taken_for_a_name(arguments, source, capsys):
    with pytest.raises(SystemExit):
        main([source, *arguments])
    assert f"there is no image file {source}" in capsys.readouterr().err


def test_sdedit_does_not_add_the_noise_that_made_the_source(arguments, random_weights, monkeypatch):
    noises = []
    randn = torch.randn

    def record(*args, **options):
        noises.append(randn(*args, **options))
        return noises[-1]

    options = parse_options([SOURCE, "--method", "sdedit", "--size", "32", *arguments])
    model = load_model(random_weights, 32)
    monkeypatch.setattr(torch, "randn", record)
    edit.edit(options, model)
    of_the_source, of_sdedit = (noise.flatten() for noise in noises)
    assert (of_the_source - of_sdedit).abs().mean() > 0.5


def test_a_damaged_image_is_an_error_in_one_line(arguments, tmp_path, capsys):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    options = [str(path), "--method", "sdedit", "--size", "32", *arguments]
    assert run_command(lambda: main(options)) == 2
    assert "broken.png" in capsys.readouterr().err
