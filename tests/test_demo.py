import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from datasets.lmdb_store import count_records
from easy_diffusion.animation.camera import MOVES
from easy_diffusion.demo import main, read_mask
from easy_diffusion.training.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = ["--minutes", "0.15", "--dishes", "600", "--size", "32", "--steps", "2", "--inpaintings", "1",
         "--seconds", "1", "--fps", "6", "--show", "64"]


def start(out, *more):
    return subprocess.Popen([sys.executable, "-u", "-m", "easy_diffusion.demo", *SMALL, *more, "--out", str(out)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was killed at three moments, one of them while it trained, and started again each time."""
    out, chance, seconds = tmp_path_factory.mktemp("demo") / "out", random.Random(0), []
    for moment in ("drawing", "training", "anywhere"):
        run = start(out, "番茄炒鸡蛋")
        if moment == "drawing":
            while count_records(out / "dishes_32") == 0:
                assert run.poll() is None, run.communicate()[0]
                time.sleep(0.05)
        if moment == "training":
            while not (out / "model_32.safetensors").exists():
                assert run.poll() is None, run.communicate()[0]
                time.sleep(0.05)
        time.sleep(chance.uniform(0, 1) + (5 if moment == "anywhere" else 0))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        seconds.append(load_checkpoint(out / "model_32.safetensors")["seconds"] if (out / "model_32.safetensors").exists() else 0)
    run = start(out, "番茄炒鸡蛋")
    log = run.communicate(timeout=200)[0]
    assert run.returncode == 0, log
    return out, log, seconds


def test_killed_at_any_moment_it_goes_on_and_finishes(finished):
    out, log, seconds = finished
    assert seconds == sorted(seconds)                       # no training that was saved is lost
    assert count_records(out / "dishes_32") == 600
    assert load_checkpoint(out / "model_32.safetensors")["seconds"] >= 0.15 * 60
    first = re.search(r"step (\d+), loss", log)
    assert first is None or int(first[1]) > 0               # it went on from a checkpoint, or the training was complete
    assert {p.name for p in out.iterdir()} == {"dishes_32", "model_32.safetensors", "held_out_32.png", "loss_32.png", "番茄炒鸡蛋.png",
                                               "番茄炒鸡蛋_circle.gif"}


def test_it_says_what_it_does(finished):
    _, log, _ = finished
    for says in ("番茄炒鸡蛋", "sampling", "wrote", "s in all"):
        assert says in log


def test_a_second_run_finds_the_checkpoint_and_another_dish_and_move_is_made(finished):
    out, _, _ = finished
    before, sheet = load_checkpoint(out / "model_32.safetensors")["index"], (out / "held_out_32.png").stat().st_mtime
    run = start(out, "土豆炒青椒", "--move", "right")
    log = run.communicate(timeout=120)[0]
    assert run.returncode == 0, log
    assert load_checkpoint(out / "model_32.safetensors")["index"] == before and (out / "held_out_32.png").stat().st_mtime == sheet
    with Image.open(out / "土豆炒青椒_right.gif") as gif:
        assert gif.size == (64, 64) and gif.info["loop"] == 0 and gif.n_frames > 1


def test_the_same_in_the_space_of_an_autoencoder(tmp_path):
    """The autoencoder is trained, the dishes are encoded, and the network learns, draws and repaints latents; killed in between."""
    out, arguments = tmp_path / "out", ("番茄炒鸡蛋", "--latent", "--dishes", "96", "--minutes", "0.1")
    run = start(out, *arguments)
    while not (out / "autoencoder_32.training.safetensors").exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run = start(out, *arguments)
    log = run.communicate(timeout=200)[0]
    assert run.returncode == 0 and "latents [16, 4, 4]" in log, log
    assert {path.name for path in out.iterdir()} == {
        "dishes_32", "latents_32", "autoencoder_32.safetensors", "autoencoder_32.training.safetensors", "autoencoder_32.png",
        "model_32_latent.safetensors", "held_out_32_latent.png", "loss_32_latent.png", "番茄炒鸡蛋.png", "番茄炒鸡蛋_circle.gif"}
    with Image.open(out / "番茄炒鸡蛋_circle.gif") as gif:
        assert gif.size == (64, 64) and gif.n_frames > 1


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A photograph of 90×70 pixels, and a mask of its right half."""
    folder = tmp_path_factory.mktemp("photograph")
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC).save(folder / "晚饭.jpg")
    mask = np.zeros((70, 90), np.uint8)
    mask[:, 45:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[1:]).save(folder / "small.png")
    turned = Image.Exif()
    turned[0x0112] = 6                                                      # the camera was held upright: 70×90 when looked at
    Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC).save(folder / "upright.jpg", exif=turned)
    strokes = Image.new("RGBA", (70, 90))                                   # white on nothing, as drawing programs save it
    strokes.paste((255, 255, 255, 255), (0, 60, 70, 90))
    strokes.save(folder / "strokes.png")
    return folder


def test_a_mask_lies_where_one_drew_it(photograph):
    """The middle 70×70 of 70×90 pixels is what the photograph becomes: its last 20 rows are white, of 32 the last 9."""
    mask = read_mask(photograph / "strokes.png", photograph / "upright.jpg", 32)
    assert mask[23:].all() and not mask[:22].any()
    with pytest.raises(ValueError, match="70×90, the picture .* 90×70"):
        read_mask(photograph / "strokes.png", photograph / "晚饭.jpg", 32)


def test_all_moves_over_a_photograph_whose_half_is_repainted_as_films_and_as_a_sheet(finished, photograph):
    out, _, _ = finished
    run = start(out, "--image", str(photograph / "晚饭.jpg"), "--mask", str(photograph / "mask.png"), "--move", "all", "--format", "webp")
    log = run.communicate(timeout=200)[0]
    assert run.returncode == 0, log
    for move in (*MOVES, "all"):
        with Image.open(out / f"晚饭_{move}.webp") as film:
            assert film.n_frames == 6 and film.info["loop"] == 0
            assert move == "all" or film.size == (64, 64)
    mosaic = Image.open(out / "晚饭_all.webp").size
    assert mosaic[0] > 5 * 32 and mosaic[1] > 2 * 32


def test_several_names_become_films_and_a_mosaic(finished):
    out, _, _ = finished
    run = start(out, "土豆汤", "清炒生菜", "--move", "up", "--format", "mp4")
    log = run.communicate(timeout=200)[0]
    assert run.returncode == 0, log
    frames = [iio.imread(out / f"{name}_up.mp4") for name in ("土豆汤", "清炒生菜", "all")]
    assert [len(some) for some in frames] == [6, 6, 6] and frames[0].shape[1:] == (64, 64, 3) and frames[2].shape[2] > 64


def test_help_is_complete_and_wrong_options_are_named(capsys, photograph):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == (0 if arguments == ("--help",) else 2)
        return capsys.readouterr()
    text = call("--help").out
    for option in ("--move", "--reverse", "--out", "--minutes", "--dishes", "--size", "--latent", "--image", "--mask", "--inpainter", "--sd",
                   "--prompt", "--steps", "--guidance", "--inpaintings", "--seconds", "--fps", "--format", "--show", "--seed"):
        assert option in text
    assert all(move in text for move in MOVES)
    picture = str(photograph / "晚饭.jpg")
    both = call("--image", picture, "番茄汤").err
    assert picture in both and "番茄汤" in both
    for wrong in (("--size", "60"), ("--move", "sideways"), ("--minutes", "0"), ("--fps", "0"), ("--inpaintings", "0"),
                  ("--steps", "1001"), ("a/b",), ("--image", "nowhere.jpg"), ("--mask", picture), ("--inpainter", "sd"), ("--format", "avi"),
                  ("--guidance", "0.5"), ("--inpainter", "sd", "--sd", "nowhere"), ("--sd-config", "nowhere")):
        assert wrong[-1] in call(*wrong).err or wrong[-2] in ("--inpainter", "--sd-config")
    assert "90×69, the picture" in call("--image", picture, "--mask", str(photograph / "small.png")).err
