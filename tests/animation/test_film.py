import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from easy_diffusion.animation import camera
from easy_diffusion.animation.film import FORMATS, animate, inpaint_nested, inpaint_strip, mosaic, write_film, write_gif
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.images import contact_sheet, load_chinese_font
from easy_diffusion.inpainting.repaint import make_inpainter
from easy_diffusion.inpainting.stable_diffusion_inpainter import make_inpainter_from_networks
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.unet import UNet

SIZES = [(64, 64), (64, 48), (37, 53)]                                      # (W, H)


def brush(picture, mask):
    return np.where(mask[..., None], np.uint8(200), picture)


def networks():
    """Two painters with untrained networks, which take pictures of any size: RePaint in pixels, and Stable Diffusion's way."""
    torch.manual_seed(0)
    network = UNet(channels=(32, 64), patch=4)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    nine, autoencoder = UNet(9, 4, (32, 64), context_dim=16).eval(), Autoencoder((32, 32), scale=0.2).eval()
    return {"repaint": make_inpainter(diffusion.denoiser(network.eval()), diffusion.schedule, 3, 1, 2, size_multiple=network.size_multiple),
            "sd": make_inpainter_from_networks(nine, autoencoder, torch.randn(1, 5, 16), torch.zeros(1, 5, 16), size=32, steps=2)}


PAINTERS = networks()


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def picture(request):
    w, h = request.param
    small = np.random.default_rng(0).integers(0, 256, (h // 20 + 1, w // 20 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(request.param, Image.Resampling.BICUBIC))


def read(path):
    """By Pillow: frames as RGB, their durations in milliseconds, and what the file says of loops."""
    with Image.open(path) as film:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(film):
            frames.append(np.asarray(frame.convert("RGB")))
            durations.append(frame.info["duration"])
        return frames, durations, film.info.get("loop")


def frames_by_ffmpeg(path):
    """How many frames ffmpeg decodes of a file."""
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"], capture_output=True, text=True).stderr
    return int(said.rsplit("frame=", 1)[1].split()[0])


@pytest.mark.parametrize("name", PAINTERS)
@pytest.mark.parametrize("move", camera.MOVES)
def test_every_move_becomes_files_that_pillow_and_ffmpeg_read_back(picture, move, name, tmp_path):
    film = animate(picture, move, PAINTERS[name], seconds=1.2, fps=10)
    h, w = picture.shape[:2]
    assert len(film) == 12 and all(frame.shape == (h, w, 3) and frame.dtype == np.uint8 for frame in film)
    for ending in FORMATS:
        write_film(tmp_path / f"番茄汤.{ending}", film, fps=10)
    gif, durations, loop = read(tmp_path / "番茄汤.gif")
    webp, milliseconds, forever = read(tmp_path / "番茄汤.webp")            # ffmpeg does not decode moving WebP
    mp4, about = iio.imread(tmp_path / "番茄汤.mp4"), iio.immeta(tmp_path / "番茄汤.mp4")
    assert durations == milliseconds == [100] * 12 and loop == forever == 0
    assert about["fps"] == 10 and about["duration"] == pytest.approx(1.2, abs=0.01)
    assert frames_by_ffmpeg(tmp_path / "番茄汤.gif") == frames_by_ffmpeg(tmp_path / "番茄汤.mp4") == len(mp4) == 12
    for back in (gif, webp, mp4[:, :h, :w]):                                # each frame is nearest to the one that it was
        distances = np.abs(np.stack(back)[:, None].astype(np.int16) - np.stack(film)).mean(axis=(2, 3, 4))
        assert distances.diagonal().max() < 20 and (distances.diagonal() <= distances.min(axis=1) + 0.3).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["番茄汤.gif", "番茄汤.mp4", "番茄汤.webp"]


@pytest.mark.parametrize("move", camera.MOVES)
def test_the_painter_is_called_as_often_as_it_says_whatever_the_number_of_frames(picture, move):
    times = {"circle": 1, "centre": 4}.get(move, 9 if "-" in move else 3)
    for fps in (5, 20):
        masks = []
        def paint(p, mask, masks=masks):
            assert p.shape == picture.shape and mask.shape == p.shape[:2] and mask.dtype == bool and (p[mask] == 127).all()
            masks.append(mask)
            return brush(p, mask)
        film = animate(picture, move, paint, inpaintings=3, pixels=5, seconds=2, fps=fps, size=(96, 80))
        assert len(masks) == times and all(mask.any() and not mask.all() for mask in masks)
        assert len(film) == 2 * fps and film[0].shape == (80, 96, 3)


@pytest.mark.parametrize("move", camera.DIRECTIONS)
def test_a_strip_is_painted_through_the_views_of_the_camera(picture, move):
    """A painter that knows the wall around the picture gives the wall; each straight window is what `uncover` shows."""
    h, w = picture.shape[:2]
    dx, dy = camera.DIRECTIONS[move]
    wall = np.random.default_rng(1).integers(0, 256, (3 * h, 3 * w, 3), dtype=np.uint8)
    wall[h:2 * h, w:2 * w] = picture
    places, seen = iter(camera.pan_windows(move, 6, 3)), [picture]
    def paint(p, mask):
        x, y = next(places)
        truth = wall[h + y:2 * h + y, w + x:2 * w + x]
        assert np.array_equal(p[~mask], truth[~mask])
        if "-" not in move:
            moved, new = camera.uncover(seen[-1], move, 6)
            assert np.array_equal(moved, p) and np.array_equal(new, mask)
        seen.append(np.where(mask[..., None], truth, p))
        return seen[-1]
    canvas, (x0, y0) = inpaint_strip(picture, move, paint, 3, 6)
    assert next(places, None) is None and (x0, y0) == (18 * (dx < 0), 18 * (dy < 0))
    expected = np.full((h + 18 * abs(dy), w + 18 * abs(dx), 3), 127, np.uint8)     # what the camera never sees stays grey
    for x, y in [(0, 0), *camera.pan_windows(move, 6, 3)]:
        expected[y0 + y:y0 + y + h, x0 + x:x0 + x + w] = wall[h + y:2 * h + y, w + x:2 * w + x]
    assert np.array_equal(canvas, expected)


def test_nested_pictures_hold_one_another(picture):
    h, w = picture.shape[:2]
    nested, boxes = inpaint_nested(picture, brush, brush, 2, 4)
    assert len(nested) == len(boxes) == 3
    closed, widest, wider = nested
    for outer, inner, (left, top, right, bottom) in ((widest, wider, boxes[1]), (wider, picture, boxes[2]), (closed, widest, boxes[0])):
        small = Image.fromarray(inner).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        assert np.array_equal(outer[top:bottom, left:right], np.asarray(small))


@pytest.mark.parametrize("move", camera.MOVES)
def test_a_loop_has_no_jump_forwards_or_backwards(move):
    """The step from the last frame to the first: for the ways there and back as small as the one from the first to the second, since they
    are slow where they turn; for the others like those before and after it."""
    def film_of(**options):
        y, x = np.mgrid[:64, :64]
        smooth = np.stack([3 * x, 3 * y, x + y], axis=-1).astype(np.uint8)
        return animate(smooth, move, lambda p, mask: np.where(mask[..., None], np.uint8(127), p), pixels=4, seconds=2, fps=10, **options)
    film = film_of()
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(film, film[1:] + film[:1])]
    if move in camera.DIRECTIONS:
        assert steps[-1] == pytest.approx(steps[0], abs=0.02) and steps[-1] < 0.2 * max(steps)
    else:
        assert steps[-1] < 1.2 * max(steps[-2], steps[0])
    assert all(np.array_equal(a, b) for a, b in zip(film_of(reverse=True), film[:1] + film[:0:-1]))


def test_a_name_is_drawn_first():
    drawn = []
    def draw(name):
        drawn.append(name)
        return np.zeros((48, 64, 3), np.uint8)
    assert len(animate("番茄汤", "up", brush, generate=draw, seconds=1, fps=5)) == 5 and drawn == ["番茄汤"]


def test_what_lies_around_may_have_a_painter_of_its_own():
    picture = np.zeros((48, 64, 3), np.uint8)
    for move, expected in (("right", ["beside"]), ("circle", ["around"]), ("centre", ["around", "beside"])):
        asked = []
        def painter_called(name, asked=asked):
            return lambda p, mask: asked.append(name) or brush(p, mask)
        animate(picture, move, painter_called("beside"), inpaint_around=painter_called("around"), seconds=1, fps=4)
        assert asked == expected


def test_what_cannot_be_animated_is_named():
    picture = np.zeros((48, 64, 3), np.uint8)
    for wrong, says in ((("番茄汤", "up"), "draw"), ((picture, "sideways"), "sideways"), ((picture[0], "up"), "uint8")):
        with pytest.raises(ValueError, match=says):
            animate(*wrong, brush)
    for options, says in ((dict(inpaintings=0), "0 times"), (dict(seconds=-3), "-3"), (dict(fps=0), "4.0, 0"), (dict(pixels=0), "not 0"),
                          (dict(size=(0, 5)), r"\(0, 5\)")):
        with pytest.raises(ValueError, match=says):
            animate(picture, "up", brush, **options)


def test_the_frames_of_a_gif_share_one_palette_that_suits_all_of_them(tmp_path):
    """Ten frames of ten colours: a GIF of one palette is within 2% of each colour, and stores no second palette."""
    film = [np.full((40, 40, 3), colour, np.uint8) for colour in np.random.default_rng(0).integers(0, 256, (10, 3))]
    write_gif(tmp_path / "a.gif", film, fps=20)
    frames, durations, _ = read(tmp_path / "a.gif")
    assert durations == [50] * 10
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, film)) < 5
    data = (tmp_path / "a.gif").read_bytes()
    blocks = data.split(b"\x21\xf9\x04")[1:]                                # a graphic control extension before each image
    flags = [block[block.index(b"\x2c") + 9] for block in blocks]
    assert len(blocks) == 10 and not any(flag & 0x80 for flag in flags)     # bit 7: a palette of its own


def test_a_film_may_play_once(tmp_path):
    film = [np.roll(np.arange(64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8), i, axis=1) for i in range(5)]
    write_film(tmp_path / "a.gif", film, fps=10, loop=False)
    write_film(tmp_path / "a.webp", film, fps=10, loop=False)
    assert read(tmp_path / "a.gif")[2] is None
    with Image.open(tmp_path / "a.webp") as webp:
        assert webp.info["loop"] == 1


def test_colours_survive_and_odd_sides_gain_a_row_in_an_mp4(tmp_path):
    film = [np.full((37, 53, 3), (200, 60, 90), np.uint8)] * 8
    write_film(tmp_path / "a.mp4", film, fps=8)
    back = iio.imread(tmp_path / "a.mp4")
    assert back.shape == (8, 38, 54, 3) and np.abs(back.astype(int) - (200, 60, 90)).max() < 6


def test_unknown_formats_and_empty_films_are_named(tmp_path):
    film = [np.zeros((8, 8, 3), np.uint8)]
    for path, frames in ((tmp_path / "a.avi", film), (tmp_path / "a.gif", [])):
        with pytest.raises(ValueError, match="gif, mp4, webp"):
            write_film(path, frames)
    with pytest.raises(ValueError, match="not -5"):
        write_film(tmp_path / "a.gif", film, fps=-5)
    assert not list(tmp_path.iterdir())


def test_equal_neighbours_are_shown_for_as_long_as_both(tmp_path):
    film = [np.full((16, 16, 3), level, np.uint8) for level in (10, 10, 10, 90, 200)]
    for ending in ("gif", "webp"):
        write_film(tmp_path / f"a.{ending}", film, fps=10)
        assert sum(read(tmp_path / f"a.{ending}")[1]) == 500


def test_names_are_drawn_in_chinese():
    """A font without the character would draw the same box for every name."""
    font = load_chinese_font(20)
    assert len({bytes(font.getmask(character)) for character in "番茄炒蛋"}) == 4
    with pytest.raises(OSError, match="mplfonts"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("easy_diffusion.images.FONTS", ())
            load_chinese_font(20)
    sheet = contact_sheet([[np.full((64, 64, 3), 200, np.uint8)] * 2] * 3, ["番茄炒鸡蛋", "土豆汤", "清炒生菜"], columns=2, side=64)
    assert np.asarray(sheet).min() < 60                                     # the names; all else is bright


def test_a_mosaic_shows_films_side_by_side_with_their_names():
    films = [[np.full((32, 32, 3), 10 * i + k, np.uint8) for k in range(4)] for i in range(3)]
    frames = mosaic(films, ["番茄汤", "土豆汤", "清炒生菜"], columns=2, side=32)
    assert len(frames) == 4 and len({frame.shape for frame in frames}) == 1
    assert all((frames[k] == 20 + k).all(axis=2).sum() >= 32 * 32 for k in range(4))
    assert contact_sheet([[films[0][0]]] * 2, ["番茄汤", "土豆汤"], columns=4, side=32).size == (2 * 35 + 3, 43)
    with pytest.raises(ValueError, match="4, 2"):
        mosaic([films[0], films[1][:2]], ["番茄汤", "土豆汤"])
