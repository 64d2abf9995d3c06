"""The command that trains a model of films, as its user calls it; and the films of a model."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from easy_diffusion import demo, train_motion
from easy_diffusion.command_line import run_command
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.film_presets import (
    Films,
    complete_film,
    generate_films,
    inflate_model,
    windowed,
)
from easy_diffusion.generate import generate_images
from easy_diffusion.networks.motion import VideoUNet
from easy_diffusion.pretrained import find_sizes, load_model, save_model
from easy_diffusion.train_motion import main

SHORT = ["--minutes", "0.02", "--films", "8", "--batch-size", "2", "--size", "32"]
NAMES = ["转动番茄炒鸡蛋", "静止豆腐汤"]


@pytest.fixture
def short_sheet(monkeypatch):
    """A sheet of one film for each motion, in two steps."""
    monkeypatch.setattr(train_motion, "SHOWN", 1)
    monkeypatch.setattr(train_motion, "STEPS", 2)


def test_it_trains_saves_and_shows_films(random_weights, tmp_path, capsys, short_sheet):
    arguments = [*SHORT, "--frames", "3", "--weights", str(random_weights), "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert find_sizes(tmp_path / "weights", films=True) == [32]
    assert find_sizes(tmp_path / "weights") == []
    model = load_model(tmp_path / "weights", films=True)
    assert isinstance(model.network, VideoUNet)
    assert {"转", "动"} <= set(model.encoder.characters)
    assert any(module.proj_out.weight.abs().max() > 0 for module in model.network.motion_up)
    with Image.open(tmp_path / "films_32.gif") as film:
        assert film.n_frames > 1
    assert capsys.readouterr().out.count("wrote") == 2

    # The same command does not train again.
    assert main(arguments) == 0
    again = load_model(tmp_path / "weights", films=True).network.state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.network.state_dict().items())


def test_frozen_keeps_the_image_network(random_weights, tmp_path, short_sheet):
    main([*SHORT, "--frames", "2", "--frozen", "--weights", str(random_weights),
          "--out", str(tmp_path)])
    before = load_model(random_weights, 32).network.half().state_dict()
    after = load_model(tmp_path / "weights", films=True).network.half().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_films_of_an_inflated_model_are_its_images(random_weights):
    model = load_model(random_weights, 32)
    names = ["番茄炒鸡蛋", "豆腐汤"]
    films = generate_films(inflate_model(model), names, frames=1, size=32, steps=3)
    images = generate_images(*model[:3], names, 32, steps=3)
    assert films.shape == (2, 1, 32, 32, 3)
    assert np.abs(films[:, 0].astype(int) - images).max() <= 1


def test_a_film_depends_on_its_name_and_seed_alone(random_weights):
    model = inflate_model(load_model(random_weights, 32))
    both = generate_films(model, NAMES, frames=3, size=32, steps=2, seed=4)
    second = generate_films(model, NAMES[1:], frames=3, size=32, steps=2, seed=5)
    assert np.abs(both[1].astype(int) - second[0]).max() <= 1


def test_a_model_of_latents_gives_films_too(random_weights):
    model = load_model(random_weights, 64)
    assert model.autoencoder is not None
    films = generate_films(inflate_model(model), NAMES, frames=2, size=64, steps=2)
    assert films.shape == (2, 2, 64, 64, 3) and films.dtype == np.uint8


def test_films_put_the_channels_first():
    frames = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    (film, name), = Films([(frames, "静止豆腐汤")])
    assert film.shape == (3, 2, 4, 4) and name == "静止豆腐汤"
    assert torch.equal(film[:, 1], frames[1])


def test_a_model_of_latents_is_refused(random_weights, tmp_path, capsys):
    arguments = ["--size", "64", "--weights", str(random_weights), "--out", str(tmp_path)]
    assert run_command(lambda: main(arguments)) == 2
    assert "works on latents" in capsys.readouterr().err


def test_a_folder_without_films_names_the_command(random_weights):
    with pytest.raises(FileNotFoundError, match="train_motion trains one"):
        load_model(random_weights, films=True)


@pytest.mark.parametrize(
    "wrong", [["--frames", "1"], ["--minutes", "0"], ["--films", "3"], ["--size", "63"]]
)
def test_wrong_options_end_with_a_message(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_demo_writes_a_looping_film_of_a_motion(random_weights, tmp_path, capsys):
    model = inflate_model(load_model(random_weights, 32))
    save_model(tmp_path / "weights", 32, model)
    options = ["番茄汤", "--motion", "sway", "--weights", str(tmp_path / "weights"), "--steps", "2",
               "--out", str(tmp_path), "--show", "64"]
    assert demo.main(options) == 0
    with Image.open(tmp_path / "番茄汤_sway.gif") as film:
        assert film.n_frames == 8 and film.info["loop"] == 0
    assert "番茄汤_sway.gif" in capsys.readouterr().out


@pytest.mark.parametrize("more, message", [
    ([], "networks of films for no pixels.*train_motion"),
    (["--image", "x.png"], "not for a photograph"),
])
def test_the_demo_says_what_a_motion_needs(random_weights, more, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(["番茄汤", "--motion", "turn", "--weights", str(random_weights), *more])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


# ------------------------------------------------------------------------- given frames, long films


def test_known_frames_stay_and_the_others_are_generated(random_weights):
    model = inflate_model(load_model(random_weights, 32))
    film = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    is_known = np.array([True, False, True, False])
    completed = complete_film(model, NAMES[0], film, is_known, steps=6)
    assert completed.shape == film.shape and completed.dtype == np.uint8
    assert np.array_equal(completed[is_known], film[is_known])
    assert not np.array_equal(completed[~is_known], film[~is_known])


def test_complete_film_refuses_what_does_not_fit(random_weights):
    film = np.zeros((2, 32, 32, 3), np.uint8)
    model = inflate_model(load_model(random_weights, 32))
    with pytest.raises(ValueError, match="3 values of is_known do not fit 2 frames"):
        complete_film(model, NAMES[0], film, np.ones(3, bool))
    with pytest.raises(ValueError, match="not one of latents"):
        complete_film(load_model(random_weights, 64), NAMES[0], film, np.ones(2, bool))


def mean_denoiser(x_t, t):
    """A denoiser whose prediction depends on all frames of its window."""
    return Prediction(x0=x_t.mean(dim=2, keepdim=True).expand_as(x_t), eps=2 * x_t)


def test_rolling_a_film_by_the_stride_rolls_the_prediction_of_windows():
    x_t = torch.randn(1, 3, 8, 4, 4)
    denoise = windowed(mean_denoiser, frames=4, stride=2)
    torch.testing.assert_close(
        denoise(x_t.roll(2, dims=2), None).x0, denoise(x_t, None).x0.roll(2, dims=2)
    )
    for stride in (0, 5):
        with pytest.raises(ValueError, match=f"from 1 to 4, not {stride}"):
            windowed(mean_denoiser, 4, stride)


def test_windows_average_where_they_overlap():
    x_t = torch.arange(6.0)[None, None, :, None, None].expand(2, 3, 6, 4, 4)
    prediction = windowed(mean_denoiser, frames=4, stride=2)(x_t, None)
    # The windows 0 … 3, 2 … 5 and 4, 5, 0, 1 have the means 1.5, 3.5 and 2.5.
    assert prediction.x0[0, 0, :, 0, 0].tolist() == [2.0, 2.0, 2.5, 2.5, 3.0, 3.0]
    assert torch.equal(prediction.eps, 2 * x_t)


@pytest.mark.parametrize("length, stride", [(4, 1), (7, 3), (9, 4)])
def test_every_frame_lies_in_a_window(length, stride):
    x_t = torch.randn(1, 3, length, 4, 4)
    prediction = windowed(mean_denoiser, frames=4, stride=stride)(x_t, None)
    torch.testing.assert_close(prediction.eps, 2 * x_t)
    assert prediction.x0.isfinite().all()
    with pytest.raises(ValueError, match="3 frames is shorter than a window of 4"):
        windowed(mean_denoiser, 4, stride)(x_t[:, :, :3], None)
