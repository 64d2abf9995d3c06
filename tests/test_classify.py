"""The command that classifies images, as its user calls it."""

import pytest
from PIL import Image

from datasets.dishes import draw_dish
from easy_diffusion.classify import main
from easy_diffusion.command_line import run_command

MENU = ["番茄炒鸡蛋", "土豆炒牛肉", "豆腐炒虾仁", "青椒炒香肠", "番茄汤", "鸡蛋面", "凉拌木耳"]


@pytest.fixture
def menu(tmp_path):
    path = tmp_path / "menu.txt"
    path.write_text("\n".join(MENU), "utf-8")
    return path


def save_dish(path, name, side):
    Image.fromarray(draw_dish(name, side, seed=5).transpose(1, 2, 0)).save(path)
    return str(path)


def test_it_ranks_the_captions_of_each_image(menu, tmp_path, capsys):
    images = [
        save_dish(tmp_path / "a.png", "土豆炒牛肉", 64),
        save_dish(tmp_path / "b.png", "番茄汤", 80),
        save_dish(tmp_path / "c.png", "铁板玉米", 64),
    ]
    assert main([*images, "--captions", str(menu)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 6
    best = [lines[k].split()[-1] for k in (1, 7)]
    assert best == ["土豆炒牛肉", "番茄汤"]
    assert lines[13].endswith("(none of these)")
    assert lines[1].split()[:4] == ["1", "0.0", "±", "0.0"]


def test_it_takes_latents_and_says_that_a_small_image_is_enlarged(
    menu, tmp_path, random_weights, capsys
):
    image = save_dish(tmp_path / "a.png", "番茄汤", 48)
    arguments = [image, "--captions", str(menu), "--weights", str(random_weights), "--size", "64"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "48×48 pixels; it is enlarged to 64×64" in captured.err
    assert len(captured.out.splitlines()) == 6


def test_captions_with_unknown_characters_are_named_and_left_out(menu, tmp_path, capsys):
    image = save_dish(tmp_path / "a.png", "番茄汤", 64)
    menu.write_text("番茄汤\n\n麻婆豆腐\n番茄汤\n", "utf-8-sig")
    assert main([image, "--captions", str(menu)]) == 0
    captured = capsys.readouterr()
    assert "1 captions left out: the model does not know 婆、麻" in captured.err
    assert len(captured.out.splitlines()) == 3              # the caption, and none of these


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has no caption"),
        (b"  \n\n", "has no caption"),
        ("番茄汤".encode("gb18030"), "is not UTF-8 text"),
        ("麻婆".encode(), "no caption has only characters that the model knows"),
    ],
)
def test_a_wrong_captions_file_is_one_line(menu, tmp_path, capsys, content, message):
    image = save_dish(tmp_path / "a.png", "番茄汤", 64)
    menu.write_bytes(content)
    assert run_command(lambda: main([image, "--captions", str(menu)])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_file_is_one_line(menu, tmp_path, capsys):
    for arguments in (["none.png", "--captions", str(menu)], ["a.png", "--captions", "none.txt"]):
        assert run_command(lambda arguments=arguments: main(arguments)) == 2
        assert "No such file" in capsys.readouterr().err
