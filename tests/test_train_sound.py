"""The command that trains an audio encoder, and the demo with a sound, as their user calls them."""

import shutil

import pytest
import soundfile
import torch
from PIL import Image

from datasets.dish_sounds import SAMPLE_RATE, SOUNDS, cook_sound
from easy_diffusion import demo, train_sound
from easy_diffusion.condition_presets import add_audio_encoder, hear_dishes
from easy_diffusion.demo_options import parse_options
from easy_diffusion.generate import generate_images
from easy_diffusion.networks.weights_io import load_tree, save_tree
from easy_diffusion.pretrained import (
    audio_encoder_path,
    find_sizes,
    load_model,
    load_sound_model,
    save_audio_encoder,
    save_model,
)
from easy_diffusion.train_sound import main

SHORT = ["--minutes", "0.02", "--dishes", "8", "--batch-size", "2", "--size", "32"]
SHORT_FILM = ["--steps", "2", "--seconds", "0.5", "--size", "32"]


@pytest.fixture(scope="module")
def trained(random_weights, tmp_path_factory):
    """The --out of a short training; its checkpoint is that of a finished one."""
    out = tmp_path_factory.mktemp("sound") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sound, "SHOWN", 1)
        assert main([*SHORT, "--weights", str(random_weights), "--out", str(out)]) == 0
    return out


def test_it_trains_the_audio_encoder_alone(trained, random_weights):
    model = load_sound_model(trained / "weights")
    before = load_model(random_weights, 32)
    for part, other in ((model.network, before.network), (model.encoder.second, before.encoder)):
        other = other.state_dict()
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, other[name].half().float()), name
    torch.manual_seed(0)
    initial = add_audio_encoder(before).encoder.first.state_dict()
    moved = [not torch.equal(initial[k].half().float(), v)
             for k, v in model.encoder.first.state_dict().items()]
    assert all(moved)


def test_it_shows_what_was_heard_and_writes_the_sounds(trained, random_weights):
    assert Image.open(trained / "heard_32.png").height > 8 * 32
    for way in SOUNDS:
        samples, rate = soundfile.read(trained / "sounds" / f"{way}.wav")
        expected = cook_sound(way, seed=train_sound.SEED)
        assert rate == SAMPLE_RATE and abs(samples - expected).max() < 1e-4
    steps = load_tree(audio_encoder_path(trained / "weights", 32))["training"]["steps"]
    assert steps > 0

    # The same command does not train again.
    before = audio_encoder_path(trained / "weights", 32).read_bytes()
    assert main([*SHORT, "--weights", str(random_weights), "--out", str(trained)]) == 0
    assert audio_encoder_path(trained / "weights", 32).read_bytes() == before


def test_an_image_depends_on_its_sound_and_its_caption(trained):
    model = load_sound_model(trained / "weights")
    torch.nn.init.normal_(model.network.conv_out.weight, std=0.1)
    (fry, tomato), (boil, _) = hear_dishes(["番茄炒鸡蛋", "番茄鸡蛋汤"])
    images = generate_images(
        *model[:3], [(fry, tomato), (boil, tomato), (fry, "土豆")], 32, steps=2, seed=[5, 5, 5]
    )
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any()


def test_the_demo_takes_a_sound(trained, tmp_path, capsys):
    arguments = ["番茄鸡蛋", "土豆", "--sound", str(trained / "sounds" / "炒.wav"),
                 "--weights", str(trained / "weights"), *SHORT_FILM, "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "番茄鸡蛋.png", "番茄鸡蛋_circle.gif", "土豆.png", "土豆_circle.gif", "all_circle.gif",
    }
    assert "note" not in capsys.readouterr().out
    assert demo.main(["番茄炒鸡蛋", *arguments[2:]]) == 0
    assert "note: 番茄炒鸡蛋 should be the names" in capsys.readouterr().out


def test_the_demo_refuses_a_sound_that_it_cannot_use(trained, random_weights, tmp_path, capsys):
    sound = str(trained / "sounds" / "炒.wav")
    (tmp_path / "text.wav").write_text("text", "utf-8")
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    soundfile.write(tmp_path / "silent.wav", torch.zeros(1000).numpy(), SAMPLE_RATE)
    weights = ["--weights", str(trained / "weights")]
    for arguments, message in (
        (["番茄", "--sound", str(tmp_path / "text.wav"), *weights], "text.wav is no sound file"),
        (["番茄", "--sound", str(tmp_path / "none.wav"), *weights], "there is no file"),
        (["番茄", "--sound", str(tmp_path / "silent.wav"), *weights], "silent.wav is silent"),
        (["番茄", "--sound", str(tmp_path / "a.raw"), *weights], "a.raw is no sound file"),
        (["--sound", sound, *weights], "needs the names of ingredients"),
        (["番茄", "--sound", sound, "--motion", "turn", *weights], "without --motion"),
        (["番茄", "--sound", sound, "--weights", str(random_weights)], "train_sound trains one"),
    ):
        with pytest.raises(SystemExit):
            parse_options(arguments)
        assert message in capsys.readouterr().err


def test_a_training_is_not_mixed_with_other_weights(trained, tmp_path, random_weights):
    shutil.copytree(trained, tmp_path / "out")
    other = load_model(random_weights, 32)
    torch.nn.init.normal_(other.network.conv_in.weight)
    save_model(tmp_path / "weights", 32, other)
    before = audio_encoder_path(tmp_path / "out" / "weights", 32).read_bytes()
    with pytest.raises(ValueError, match="give another --out"):
        main([*SHORT, "--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "out")])
    assert audio_encoder_path(tmp_path / "out" / "weights", 32).read_bytes() == before
    assert load_sound_model(tmp_path / "out" / "weights", 32)


def test_an_audio_encoder_of_another_network_is_refused(trained, random_weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="train_sound"):
        load_sound_model(random_weights, 32)
    shutil.copytree(random_weights, tmp_path / "weights")
    other = add_audio_encoder(load_model(tmp_path / "weights", 32))
    torch.nn.init.normal_(other.network.conv_in.weight)
    save_audio_encoder(tmp_path / "weights", 32, other)
    with pytest.raises(ValueError, match="other weights"):
        load_sound_model(tmp_path / "weights", 32)
    save_tree(audio_encoder_path(tmp_path / "weights", 32), {"weights": {}})
    with pytest.raises(ValueError, match="not an audio encoder"):
        load_sound_model(tmp_path / "weights", 32)
    assert find_sizes(trained / "weights") == [32]
