"""The command python -m easy_diffusion.demo: images, films, masks, options."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from easy_diffusion.animation.camera import MOVES
from easy_diffusion.demo import main
from easy_diffusion.demo_options import read_mask
from easy_diffusion.inpainting.control_inpainter import CONTROL_CHANNELS
from easy_diffusion.networks.controlnet import ControlNet, save_controlnet
from easy_diffusion.pretrained import load_model

SMALL = ["--steps", "2", "--seconds", "1", "--fps", "6", "--show", "64"]


@pytest.fixture
def run_demo(random_weights, tmp_path):
    """(arguments) → the folder of a small demo's files, made with random weights for 32 pixels."""
    def run(*arguments):
        out = tmp_path / "out"
        options = [*SMALL, "--weights", str(random_weights), "--size", "32", "--out", str(out)]
        assert main([*arguments, *options]) == 0
        return out

    return run


def test_a_name_becomes_an_image_a_film_and_a_sheet_of_held_out_dishes(run_demo, capsys):
    out = run_demo("土豆炒青椒", "--move", "right")
    assert {path.name for path in out.iterdir()} == {
        "held_out_32.png", "土豆炒青椒.png", "土豆炒青椒_right.gif",
    }
    with Image.open(out / "土豆炒青椒_right.gif") as gif:
        assert gif.size == (64, 64)
        assert gif.info["loop"] == 0
        assert gif.n_frames > 1
    log = capsys.readouterr().out
    for text in ("土豆炒青椒", "wrote", "s in all"):
        assert text in log


def test_the_largest_size_of_the_weights_is_the_default(random_weights, tmp_path):
    """Here 64 pixels, on latents."""
    options = [*SMALL, "--weights", str(random_weights), "--out", str(tmp_path)]
    assert main(["番茄汤", *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "held_out_64.png", "番茄汤.png", "番茄汤_circle.gif",
    }


@pytest.fixture
def controlnet_file(random_weights, tmp_path):
    """A ControlNet for the network of 32 pixels, whose zero convolutions are not zero."""
    unet = load_model(random_weights, 32).network
    controlnet = ControlNet.from_unet(unet, CONTROL_CHANNELS)
    for zero in (*controlnet.zero_convs, controlnet.zero_middle):
        torch.nn.init.normal_(zero.weight, std=0.1)
    path = tmp_path / "controlnet.safetensors"
    save_controlnet(path, controlnet, unet, "inpaint")
    return path


def test_a_controlnet_inpaints(run_demo, controlnet_file):
    arguments = ["番茄汤", "--move", "centre", "--seed", "3"]
    film = (run_demo(*arguments) / "番茄汤_centre.gif").read_bytes()
    out = run_demo(*arguments, "--inpainter", "control", "--controlnet", str(controlnet_file))
    assert (out / "番茄汤_centre.gif").read_bytes() != film


def test_a_controlnet_of_another_control_is_refused(random_weights, tmp_path):
    unet = load_model(random_weights, 32).network
    save_controlnet(tmp_path / "parts", ControlNet.from_unet(unet, CONTROL_CHANNELS), unet, "parts")
    with pytest.raises(ValueError, match="trained with --control parts"):
        main(["番茄汤", "--weights", str(random_weights), "--size", "32", "--inpainter", "control",
              "--controlnet", str(tmp_path / "parts"), "--out", str(tmp_path)])


def test_a_controlnet_does_not_inpaint_for_a_network_of_latents(
    random_weights, controlnet_file, tmp_path
):
    arguments = [*SMALL, "--weights", str(random_weights), "--out", str(tmp_path), "--size", "64"]
    with pytest.raises(ValueError, match="works on latents"):
        main(["番茄汤", *arguments, "--inpainter", "control", "--controlnet", str(controlnet_file)])


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


@pytest.mark.parametrize("kind", ["0 and 1", "palette", "16 bits", "grey"])
def test_masks_of_other_kinds_select_the_right_half(photo_folder, kind):
    """A palette mask of a labelling tool: index 1 is dark red."""
    half = np.zeros((70, 90), np.uint8)
    half[:, 45:] = 1
    if kind == "palette":
        mask = Image.fromarray(half, "P")
        mask.putpalette([0, 0, 0, 128, 0, 0])
    else:
        dtype = np.uint16 if kind == "16 bits" else np.uint8
        values = {"0 and 1": 1, "16 bits": 40_000, "grey": 90}
        mask = Image.fromarray(half.astype(dtype) * dtype(values[kind]))
    mask.save(photo_folder / "kind.png")
    selected = read_mask(photo_folder / "kind.png", photo_folder / "晚饭.jpg", 32)
    assert selected[:, 17:].all()
    assert not selected[:, :15].any()


@pytest.mark.parametrize("levels", [[0], [0, 10, 100]])
def test_a_mask_that_selects_nothing_is_refused_with_its_grey_levels(photo_folder, levels):
    mask = np.resize(np.array(levels, np.uint8), (70, 90))
    Image.fromarray(mask).save(photo_folder / "dark.png")
    with pytest.raises(ValueError, match=f"selects nothing .* from 0 to {levels[-1]}"):
        read_mask(photo_folder / "dark.png", photo_folder / "晚饭.jpg", 32)


def test_all_moves_over_a_photograph_with_a_mask_become_films_and_a_mosaic(run_demo, photo_folder):
    out = run_demo(
        "--image", str(photo_folder / "晚饭.jpg"), "--mask", str(photo_folder / "mask.png"),
        "--move", "all", "--format", "webp",
    )
    for move in (*MOVES, "all"):
        with Image.open(out / f"晚饭_{move}.webp") as film:
            assert film.n_frames == 6
            assert film.info["loop"] == 0
            assert move == "all" or film.size == (64, 64)
    with Image.open(out / "晚饭_all.webp") as mosaic:
        assert mosaic.size[0] > 5 * 32
        assert mosaic.size[1] > 2 * 32


def test_several_names_become_films_and_a_mosaic(run_demo):
    out = run_demo("土豆汤", "清炒生菜", "--move", "up", "--format", "mp4")
    films = [iio.imread(out / f"{name}_up.mp4") for name in ("土豆汤", "清炒生菜", "all")]
    assert [len(film) for film in films] == [6, 6, 6]
    assert films[0].shape[1:] == (64, 64, 3)
    assert films[2].shape[2] > 64


def test_help_lists_every_option_and_invalid_options_are_named(
    capsys, photo_folder, random_weights
):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main(["--weights", str(random_weights), *arguments])
        assert exit_info.value.code == (0 if arguments == ("--help",) else 2)
        return capsys.readouterr()

    help_text = call("--help").out
    for option in (
        "--move", "--reverse", "--out", "--weights", "--size", "--image", "--mask",
        "--inpainter", "--sd", "--prompt", "--steps", "--guidance", "--inpaintings",
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
        ("--size", "128"),
        ("--weights", "missing"),
        ("--move", "sideways"),
        ("--fps", "0"),
        ("--inpaintings", "0"),
        ("--steps", "1001"),
        ("a/b",),
        ("--image", "missing.jpg"),
        ("--mask", photo),
        ("--inpainter", "sd"),
        ("--inpainter", "control"),
        ("--inpainter", "control", "--controlnet", "missing"),
        ("--format", "avi"),
        ("--guidance", "0.5"),
        ("--inpainter", "sd", "--sd", "missing"),
        ("--sd-config", "missing"),
    ):
        error = call(*arguments).err
        assert arguments[-1] in error or arguments[-2] in ("--inpainter", "--sd-config")
    error = call("--image", photo, "--mask", str(photo_folder / "small.png")).err
    assert "90×69, the image" in error
