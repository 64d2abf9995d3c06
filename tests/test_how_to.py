"""Each program of docs/how_to.md runs as it stands; only the numbers of steps are reduced."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.dishes import draw_dish
from easy_diffusion.networks.text_encoder import CnClipEncoder
from easy_diffusion.train_options import parse_options

from .inpainting.test_stable_diffusion_inpainter import folder  # noqa: F401
from .networks.test_cn_clip_encoder import small  # noqa: F401
from .training.test_finetune_cn_clip import cn_clip_file  # noqa: F401

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "how_to.md").read_text("utf-8")
RECIPES = {}
for section in re.split(r"^## … ", TEXT, flags=re.M)[1:]:
    program = re.search(r"```python\n(.*?)```", section, re.S)
    if program:
        RECIPES[section.partition("?\n")[0]] = program[1]
SHORTER = [
    (r"steps=30\)", "steps=2, size=64)"),               # of Stable Diffusion
    (r"steps=(1000|25|10)\b", "steps=2"),
    (r"range\(20\)", "range(1)"),
    (r"Dishes\(400, 64\)", "Dishes(16, 64)"),
    (r"clip_cn_vit-b-16.pt\"\)\nmodel.to", 'clip.pt", "RN50", "RBT3-chinese")\nmodel.to'),
    (r"views=5\), 64\)", "views=2), 4)"),              # of the batch
    (r"steps=500", "steps=2"),
]


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    """A function that runs a program in an empty folder beside the shipped weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")

    def run_recipe(title, shorter=True):
        program = RECIPES[title]
        for original, reduced in SHORTER if shorter else ():
            program = re.sub(original, reduced, program)
        torch.manual_seed(0)
        names = {"__name__": "how_to"}
        exec(compile(program, title, "exec"), names)
        return names

    return run_recipe


def test_the_recipes_are_short():
    assert len(RECIPES) == 13
    for title, program in RECIPES.items():
        lines = [line for line in program.splitlines() if line.strip()]
        assert len(lines) <= 30, f"{title}: {len(lines)} lines"
        assert max(map(len, lines)) <= 100, title


def test_my_own_images_and_captions(run):
    assert run("use my own images and captions")["images"].shape == (3, 32, 32, 3)


def test_my_own_network(run):
    network = run("plug in my own network")["network"]
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 500])
    mask = torch.ones(2, 5, dtype=torch.bool)
    output = network(x_t, t, torch.randn(2, 5, 128), mask)
    assert output.shape == x_t.shape
    output.mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_class_label(run):
    """Not shortened: after 100 steps black images are darker than white ones."""
    names = run("condition on a class label", shorter=False)
    assert names["black"].mean() + 100 < names["white"].mean()


def test_an_image_as_condition(run):
    names = run("condition on an image")
    assert names["last"].x.shape == (1, 3, 64, 64)
    x_t, t = torch.randn(1, 3, 64, 64), torch.tensor([999])
    others = names["step"].ema_network.cpu()(x_t, t, small=torch.zeros(1, 3, 16, 16))
    assert others.shape == x_t.shape


def test_a_sound(run):
    assert run("condition on a sound")["images"].shape == (2, 64, 64, 3)


def test_a_sampler(run, monkeypatch):
    """Euler's method in x / alpha is DDIM; in float32, whose rounding 1 / alpha enlarges."""
    monkeypatch.setattr("easy_diffusion.generate.autocast", lambda _: contextlib.nullcontext())
    samples = run("add a sampler")["samples"].values()
    torch.testing.assert_close(*samples, rtol=0, atol=0.01)


def test_a_camera_move(run, tmp_path):
    frames = run("add a camera move")["frames"]
    assert (tmp_path / "pendulum.gif").exists()
    assert len(frames) == 40
    assert (frames[0] == frames[20]).all() and (frames[0] != frames[10]).any()


def test_my_own_training_loop(run):
    losses = run("use my own training loop")["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_another_text_encoder(run):
    names = run("change the text encoder")
    context, mask = names["encoder"](["番茄汤", ""])
    assert mask.sum(1).tolist() == [4, 1]
    output = names["network"](torch.randn(2, 3, 32, 32), torch.tensor([1, 2]), context, mask)
    assert output.shape == (2, 3, 32, 32)


def test_chinese_clip(run, small, tmp_path):  # noqa: F811
    torch.save(small, tmp_path / "clip_cn_vit-b-16.pt")
    names = run("use a Chinese CLIP checkpoint")
    assert names["context"].shape[::2] == (1, names["cn_clip"].dim)


def test_fine_tuning_chinese_clip(run, cn_clip_file, tmp_path, capsys):  # noqa: F811
    (tmp_path / "clip.pt").symlink_to(cn_clip_file)
    for i in range(30):
        dish = tmp_path / "my_photos" / ("番茄炒鸡蛋", "土豆牛肉汤")[i % 2]
        dish.mkdir(parents=True, exist_ok=True)
        pixels = draw_dish(dish.name, 64, i).transpose(1, 2, 0)
        Image.fromarray(pixels).save(dish / f"{i}.png")
    names = run("fine-tune Chinese CLIP on my own photographs")
    assert len(names["training"]) + len(names["test"].dataset) == 30
    assert re.findall(r"(before|after): \d+\.\d%", capsys.readouterr().out) == ["before", "after"]
    tuned = CnClipEncoder(tmp_path / "my_cn_clip.pt")
    assert tuned.fingerprint() != CnClipEncoder(cn_clip_file).fingerprint()


def test_stable_diffusions_inpainting_weights(run, folder, tmp_path):  # noqa: F811
    (tmp_path / "stable-diffusion-inpainting").symlink_to(folder)
    assert len(run("use Stable Diffusion's inpainting weights")["frames"]) == 40
    assert (tmp_path / "right.gif").exists()


def test_the_commands_for_several_gpus_have_valid_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_store").mkdir()
    commands = re.findall(r"^accelerate launch .* -m easy_diffusion\.train_model (.*)$", TEXT, re.M)
    assert len(commands) == 2
    for command in commands:
        assert parse_options(shlex.split(command)).data == Path("my_store")


def test_only_the_mathematics(run):
    """Not shortened: points lie near the ring; those of the noise are 0.5 away on average."""
    radius = run("use only the mathematics", shorter=False)["radius"]
    assert (radius - 1).abs().mean() < 0.15
