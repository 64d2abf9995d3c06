"""The command python -m easy_diffusion.demo: resuming, films, masks, options."""

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
from easy_diffusion.demo import main
from easy_diffusion.demo_options import read_mask
from easy_diffusion.training.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = [
    "--minutes", "0.15", "--dishes", "600", "--size", "32", "--steps", "2", "--inpaintings", "1",
    "--seconds", "1", "--fps", "6", "--show", "64",
]


def start_demo(out, *arguments):
    """Start a small demo in another process."""
    command = [
        sys.executable, "-u", "-m", "easy_diffusion.demo", *SMALL, *arguments, "--out", str(out)
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
    """(folder, log of the last run, seconds of training after each interruption) of a demo.

    It was killed at three moments, one of them during the training, and started again each time.
    """
    out = tmp_path_factory.mktemp("demo") / "out"
    checkpoint = out / "model_32.safetensors"
    rng = random.Random(0)
    trained_seconds = []
    for moment in ("rendering", "training", "later"):
        process = start_demo(out, "番茄炒鸡蛋")
        if moment == "rendering":
            wait_until(lambda: count_records(out / "dishes_32") > 0, process)
        if moment == "training":
            wait_until(checkpoint.exists, process)
        time.sleep(rng.uniform(0, 1) + (5 if moment == "later" else 0))
        kill(process)
        seconds = load_checkpoint(checkpoint)["seconds"] if checkpoint.exists() else 0
        trained_seconds.append(seconds)
    process = start_demo(out, "番茄炒鸡蛋")
    log = process.communicate(timeout=200)[0]
    assert process.returncode == 0, log
    return out, log, trained_seconds


def test_a_killed_demo_resumes_and_finishes(finished):
    out, log, trained_seconds = finished
    assert trained_seconds == sorted(trained_seconds)       # no saved training is lost
    assert count_records(out / "dishes_32") == 600
    assert load_checkpoint(out / "model_32.safetensors")["seconds"] >= 0.15 * 60
    # It resumed from a checkpoint, or the training was complete.
    first_step = re.search(r"step (\d+), loss", log)
    assert first_step is None or int(first_step[1]) > 0
    assert {path.name for path in out.iterdir()} == {
        "dishes_32", "model_32.safetensors", "held_out_32.png", "loss_32.png",
        "番茄炒鸡蛋.png", "番茄炒鸡蛋_circle.gif",
    }


def test_the_demo_reports_its_progress(finished):
    _, log, _ = finished
    for text in ("番茄炒鸡蛋", "sampling", "wrote", "s in all"):
        assert text in log


def test_a_second_run_uses_the_checkpoint_for_another_dish_and_move(finished):
    out, _, _ = finished
    index = load_checkpoint(out / "model_32.safetensors")["index"]
    sheet_time = (out / "held_out_32.png").stat().st_mtime
    process = start_demo(out, "土豆炒青椒", "--move", "right")
    log = process.communicate(timeout=120)[0]
    assert process.returncode == 0, log
    assert load_checkpoint(out / "model_32.safetensors")["index"] == index
    assert (out / "held_out_32.png").stat().st_mtime == sheet_time
    with Image.open(out / "土豆炒青椒_right.gif") as gif:
        assert gif.size == (64, 64)
        assert gif.info["loop"] == 0
        assert gif.n_frames > 1


def test_the_latent_demo_resumes_and_finishes(tmp_path):
    """It trains the autoencoder, encodes the dishes, trains, samples and inpaints on latents.

    It is killed once, while the autoencoder is trained.
    """
    out = tmp_path / "out"
    arguments = ("番茄炒鸡蛋", "--latent", "--dishes", "96", "--minutes", "0.1")
    process = start_demo(out, *arguments)
    wait_until((out / "autoencoder_32.training.safetensors").exists, process)
    kill(process)
    process = start_demo(out, *arguments)
    log = process.communicate(timeout=200)[0]
    assert process.returncode == 0, log
    assert "latents [16, 4, 4]" in log, log
    assert {path.name for path in out.iterdir()} == {
        "dishes_32", "latents_32", "autoencoder_32.safetensors",
        "autoencoder_32.training.safetensors", "autoencoder_32.png",
        "model_32_latent.safetensors", "held_out_32_latent.png", "loss_32_latent.png",
        "番茄炒鸡蛋.png", "番茄炒鸡蛋_circle.gif",
    }
    with Image.open(out / "番茄炒鸡蛋_circle.gif") as gif:
        assert gif.size == (64, 64)
        assert gif.n_frames > 1


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """A folder with photographs of 90×70 pixels and with masks.

    晚饭.jpg      90×70
    mask.png      90×70, the right half is white
    small.png     90×69
    upright.jpg   70×90 once it is turned as its EXIF data says
    strokes.png   70×90, the last 30 rows are white, the others transparent
    """
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC)
    photo.save(folder / "晚饭.jpg")
    mask = np.zeros((70, 90), np.uint8)
    mask[:, 45:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[1:]).save(folder / "small.png")
    exif = Image.Exif()
    exif[0x0112] = 6        # orientation: turn by 90 degrees
    photo.save(folder / "upright.jpg", exif=exif)
    strokes = Image.new("RGBA", (70, 90))
    strokes.paste((255, 255, 255, 255), (0, 60, 70, 90))
    strokes.save(folder / "strokes.png")
    return folder


def test_a_mask_is_cropped_and_scaled_like_its_photograph(photo_folder):
    """The central 70×70 of 70×90 pixels are used; the last 20 of their rows are white.

    After scaling to 32×32 these are the last 9 rows.
    """
    mask = read_mask(photo_folder / "strokes.png", photo_folder / "upright.jpg", 32)
    assert mask[23:].all()
    assert not mask[:22].any()
    with pytest.raises(ValueError, match="70×90, the image .* 90×70"):
        read_mask(photo_folder / "strokes.png", photo_folder / "晚饭.jpg", 32)


def test_all_moves_over_a_photograph_with_a_mask_become_films_and_a_mosaic(finished, photo_folder):
    out, _, _ = finished
    process = start_demo(
        out, "--image", str(photo_folder / "晚饭.jpg"), "--mask", str(photo_folder / "mask.png"),
        "--move", "all", "--format", "webp",
    )
    log = process.communicate(timeout=200)[0]
    assert process.returncode == 0, log
    for move in (*MOVES, "all"):
        with Image.open(out / f"晚饭_{move}.webp") as film:
            assert film.n_frames == 6
            assert film.info["loop"] == 0
            assert move == "all" or film.size == (64, 64)
    with Image.open(out / "晚饭_all.webp") as mosaic:
        assert mosaic.size[0] > 5 * 32
        assert mosaic.size[1] > 2 * 32


def test_several_names_become_films_and_a_mosaic(finished):
    out, _, _ = finished
    process = start_demo(out, "土豆汤", "清炒生菜", "--move", "up", "--format", "mp4")
    log = process.communicate(timeout=200)[0]
    assert process.returncode == 0, log
    films = [iio.imread(out / f"{name}_up.mp4") for name in ("土豆汤", "清炒生菜", "all")]
    assert [len(film) for film in films] == [6, 6, 6]
    assert films[0].shape[1:] == (64, 64, 3)
    assert films[2].shape[2] > 64


def test_help_lists_every_option_and_invalid_options_are_named(capsys, photo_folder):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == (0 if arguments == ("--help",) else 2)
        return capsys.readouterr()

    help_text = call("--help").out
    for option in (
        "--move", "--reverse", "--out", "--minutes", "--dishes", "--size", "--latent", "--image",
        "--mask", "--inpainter", "--sd", "--prompt", "--steps", "--guidance", "--inpaintings",
        "--seconds", "--fps", "--format", "--show", "--seed",
    ):
        assert option in help_text
    assert all(move in help_text for move in MOVES)

    photo = str(photo_folder / "晚饭.jpg")
    error = call("--image", photo, "番茄汤").err
    assert photo in error
    assert "番茄汤" in error
    for arguments in (
        ("--size", "60"),
        ("--move", "sideways"),
        ("--minutes", "0"),
        ("--fps", "0"),
        ("--inpaintings", "0"),
        ("--steps", "1001"),
        ("a/b",),
        ("--image", "missing.jpg"),
        ("--mask", photo),
        ("--inpainter", "sd"),
        ("--format", "avi"),
        ("--guidance", "0.5"),
        ("--inpainter", "sd", "--sd", "missing"),
        ("--sd-config", "missing"),
    ):
        error = call(*arguments).err
        assert arguments[-1] in error or arguments[-2] in ("--inpainter", "--sd-config")
    error = call("--image", photo, "--mask", str(photo_folder / "small.png")).err
    assert "90×69, the image" in error
