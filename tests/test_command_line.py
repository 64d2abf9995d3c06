"""All commands: consoles without Chinese characters, ranges of numbers, errors in one line."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from easy_diffusion import demo, train_demo
from easy_diffusion.command_line import check_ranges, check_writable, run_command
from easy_diffusion.demo_options import parse_options as parse_demo_options

ROOT = Path(__file__).parents[1]
WESTERN = os.environ | {"PYTHONIOENCODING": "cp1252"}


RUN_ALL = """
import json, runpy, sys
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    print("has run:", module)
"""


def run_on_a_western_console(commands):
    """Run `python -m command`, each a list of arguments, all in one process: what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        cwd=ROOT, capture_output=True, timeout=300, env=WESTERN,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert done.stdout.count(b"has run:") == len(commands)
    return done.stdout


def test_help_is_printed_on_a_console_without_chinese_characters():
    commands = ["demo", "app", "train_demo", "train_model"]
    printed = run_on_a_western_console([[f"easy_diffusion.{name}", "--help"] for name in commands])
    assert printed.count(b"usage: ") == len(commands)


def test_a_store_is_written_on_a_console_without_chinese_characters(tmp_path):
    photos = tmp_path / "photos"
    (photos / "番茄汤").mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(photos / "番茄汤" / "番茄.png")
    (photos / "番茄汤" / "坏.png").write_bytes(b"not an image")
    table = photos / "表.csv"
    lines = ["file_name,text", "番茄汤/番茄.png,番茄汤", "番茄汤/坏.png,番茄汤"]
    table.write_text("\n".join(lines), "utf-8")
    commands = []
    for name, source in (("aipos_lmdb", photos), ("table_lmdb", table), ("pokemon_lmdb", table)):
        store = str(tmp_path / name)
        commands += [
            [f"datasets.{name}", "--help"],
            [f"datasets.{name}", str(source), store, "--size", "16"],
        ]
    printed = run_on_a_western_console(commands)
    assert printed.count(b"1 images in") == 3
    assert printed.count(rb"\u574f.png") == 3                    # 坏.png


def test_the_demo_runs_on_a_console_without_chinese_characters(tmp_path, random_weights):
    printed = run_on_a_western_console([[
        "easy_diffusion.demo", "番茄汤", "--weights", str(random_weights), "--size", "32",
        "--steps", "2", "--seconds", "0.5", "--out", str(tmp_path),
    ]])
    assert rb"\u756a\u8304\u6c64" in printed                    # 番茄汤
    assert (tmp_path / "番茄汤_circle.gif").exists()


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("no such dish"), 2, "ValueError: no such dish"),
        (PermissionError(13, "Permission denied", "out"), 2, "PermissionError: [Errno 13]"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (MemoryError("of one image"), 2, "MemoryError: of one image"),
        (torch.OutOfMemoryError("out of memory"), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "the images are kept"),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_status(error, status, message, capsys):
    def fail():
        raise error

    assert run_command(fail, "the images are kept") == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_an_unexpected_error_keeps_its_traceback():
    def fail():
        raise KeyError("a mistake in the program")

    with pytest.raises(KeyError):
        run_command(fail)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0.5", "11"])
def test_a_number_out_of_range_is_refused_and_named(value, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--save-seconds", type=float)
    options = parser.parse_args([f"--save-seconds={value}"])
    with pytest.raises(SystemExit):
        check_ranges(parser, options, {"save_seconds": (1, 10)})
    assert f"--save-seconds must be from 1 to 10, not {value}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--guidance", "nan"], ["--seconds", "inf"], ["--seconds", "-1"], ["--fps", "0"],
        ["--steps", "1001"], ["--seed", "-1"], ["--show", "1000000"], ["--inpaintings", "0"],
    ],
)
def test_the_demo_refuses_numbers_out_of_range(arguments, random_weights, capsys):
    with pytest.raises(SystemExit):
        parse_demo_options(["--weights", str(random_weights), "--size", "32", *arguments])
    assert f"{arguments[0]} must be" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--minutes", "--autoencoder-minutes"])
@pytest.mark.parametrize("value", ["nan", "inf", "0"])
def test_train_demo_refuses_minutes_out_of_range(option, value, capsys):
    with pytest.raises(SystemExit):
        train_demo.parse_options([option, value])
    assert f"{option} must be" in capsys.readouterr().err


@pytest.mark.parametrize("main", [demo.main, train_demo.main])
def test_a_file_as_out_is_refused_before_the_work(main, tmp_path):
    path = tmp_path / "file"
    path.write_text("", "utf-8")
    with pytest.raises(FileExistsError):
        main(["--out", str(path)])


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()

    def refuse(**_):
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError):
        check_writable(tmp_path)
