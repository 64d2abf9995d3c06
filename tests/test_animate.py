import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from easy_diffusion import camera
from easy_diffusion.animate import FORMATS, animate, chinese_font, contact_sheet, mosaic, paint_nested, paint_strip, write_film, write_gif
from easy_diffusion.inpaint import painter
from easy_diffusion.samplers import Prediction
from easy_diffusion.schedule import NoiseSchedule

SIZES = [(64, 64), (64, 48), (37, 53)]                                      # (W, H)


def brush(picture, mask):
    return np.where(mask[..., None], np.uint8(200), picture)


def grey_model(x, t):
    return Prediction(torch.zeros_like(x), x)


PAINTERS = {"brush": brush, "repaint": painter(grey_model, NoiseSchedule.cosine(100), steps=4, jump=2, resamples=2)}


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def picture(request):
    w, h = request.param
    small = np.random.default_rng(0).integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(request.param, Image.Resampling.BICUBIC))


def read_gif(path):
    """Frames as RGB, their durations in milliseconds, and what the file says of loops."""
    with Image.open(path) as gif:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(gif):
            durations.append(frame.info["duration"])
            frames.append(np.asarray(frame.convert("RGB")))
        return frames, durations, gif.info.get("loop")


def seconds_by_ffmpeg(path):
    """How many frames ffmpeg decodes, and until when the last one is shown."""
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"], capture_output=True, text=True).stderr
    frames = int(said.rsplit("frame=", 1)[1].split()[0])
    h, m, s = said.rsplit("time=", 1)[1].split()[0].split(":")
    return frames, 3600 * int(h) + 60 * int(m) + float(s)


@pytest.mark.parametrize("name", PAINTERS)
@pytest.mark.parametrize("move", camera.MOVES)
def test_every_move_becomes_files_that_pillow_and_ffmpeg_read_back(picture, move, name, tmp_path):
    film = animate(picture, move, PAINTERS[name], seconds=1.2, fps=10)
    h, w = picture.shape[:2]
    assert len(film) == 12 and all(frame.shape == (h, w, 3) and frame.dtype == np.uint8 for frame in film)
    for ending in FORMATS:
        write_film(tmp_path / f"番茄汤.{ending}", film, fps=10)
    frames, durations, loop = read_gif(tmp_path / "番茄汤.gif")
    assert len(frames) == 12 and durations == [100] * 12 and loop == 0 and frames[0].shape == (h, w, 3)
    assert seconds_by_ffmpeg(tmp_path / "番茄汤.gif")[0] == 12
    count, seconds = seconds_by_ffmpeg(tmp_path / "番茄汤.mp4")
    assert count == 12 and abs(seconds - 1.2) < 0.11
    with Image.open(tmp_path / "番茄汤.webp") as webp:                       # ffmpeg does not decode moving WebP
        assert webp.n_frames == 12 and webp.info["loop"] == 0 and webp.size == (w, h)
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
        film = animate(picture, move, paint, repaints=3, pixels=5, seconds=2, fps=fps, size=(96, 80))
        assert len(masks) == times and all(mask.any() and not mask.all() for mask in masks)
        assert len(film) == 2 * fps and film[0].shape == (80, 96, 3)


@pytest.mark.parametrize("move", camera.DIRECTIONS)
def test_a_strip_is_painted_through_the_views_of_the_camera(picture, move):
    """A painter that knows the wall around the picture gives the wall; each straight window is what `uncover` shows."""
    h, w = picture.shape[:2]
    dx, dy = camera.DIRECTIONS[move]
    wall = np.random.default_rng(1).integers(0, 256, (3 * h, 3 * w, 3), dtype=np.uint8)
    wall[h:2 * h, w:2 * w] = picture
    places, seen = iter(camera.windows(move, 6, 3)), [picture]
    def paint(p, mask):
        x, y = next(places)
        truth = wall[h + y:2 * h + y, w + x:2 * w + x]
        assert np.array_equal(p[~mask], truth[~mask])
        if "-" not in move:
            moved, new = camera.uncover(seen[-1], move, 6)
            assert np.array_equal(moved, p) and np.array_equal(new, mask)
        seen.append(np.where(mask[..., None], truth, p))
        return seen[-1]
    canvas, (x0, y0) = paint_strip(picture, move, paint, 3, 6)
    truth = wall[h - 18 * (dy < 0):2 * h + 18 * (dy > 0), w - 18 * (dx < 0):2 * w + 18 * (dx > 0)]
    assert canvas.shape == truth.shape and np.array_equal(canvas[y0:y0 + h, x0:x0 + w], picture)
    unseen = (canvas != truth).any(axis=2)
    assert (canvas[unseen] == 127).all() and ("-" in move or not unseen.any())


def test_nested_pictures_hold_one_another(picture):
    h, w = picture.shape[:2]
    nested, boxes = paint_nested(picture, brush, brush, 2, 4)
    assert len(nested) == len(boxes) == 3
    closed, widest, wider = nested
    for outer, inner, (left, top, right, bottom) in ((widest, wider, boxes[1]), (wider, picture, boxes[2]), (closed, widest, boxes[0])):
        small = Image.fromarray(inner).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        assert np.array_equal(outer[top:bottom, left:right], np.asarray(small))


@pytest.mark.parametrize("move", camera.MOVES)
def test_a_loop_has_no_jump_forwards_or_backwards(move):
    smooth = np.array(Image.linear_gradient("L").resize((64, 64)))[..., None].repeat(3, -1)
    film = animate(smooth, move, lambda p, mask: np.where(mask[..., None], np.uint8(127), p), pixels=4, seconds=2, fps=10, size=(64, 64))
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(film, film[1:] + film[:1])]
    assert steps[-1] <= 1.3 * max(steps[:-1])                               # the last frame's successor is the first frame
    back = animate(smooth, move, lambda p, mask: np.where(mask[..., None], np.uint8(127), p), pixels=4, seconds=2, fps=10, reverse=True)
    assert all(np.array_equal(a, b) for a, b in zip(back, film[:1] + film[:0:-1]))


def test_a_name_is_drawn_first():
    drawn = []
    def draw(name):
        drawn.append(name)
        return np.zeros((48, 64, 3), np.uint8)
    assert len(animate("番茄汤", "up", brush, draw=draw, seconds=1, fps=5)) == 5 and drawn == ["番茄汤"]


def test_what_lies_around_may_have_a_painter_of_its_own():
    picture = np.zeros((48, 64, 3), np.uint8)
    for move, expected in (("right", ["beside"]), ("circle", ["around"]), ("centre", ["around", "beside"])):
        asked = []
        def painter_called(name, asked=asked):
            return lambda p, mask: asked.append(name) or brush(p, mask)
        animate(picture, move, painter_called("beside"), around=painter_called("around"), seconds=1, fps=4)
        assert asked == expected


def test_what_cannot_be_animated_is_named():
    picture = np.zeros((48, 64, 3), np.uint8)
    for wrong, says in ((("番茄汤", "up"), "draw"), ((picture, "sideways"), "sideways"), ((picture[0], "up"), "uint8")):
        with pytest.raises(ValueError, match=says):
            animate(*wrong, brush)
    with pytest.raises(ValueError, match="0 times"):
        animate(picture, "up", brush, repaints=0)


def test_the_frames_of_a_gif_share_one_palette_that_suits_all_of_them(tmp_path):
    """Ten films, one after the other, of ten colours: a GIF of one palette is within 2% of each colour, and stores no second palette."""
    film = [np.full((40, 40, 3), colour, np.uint8) for colour in np.random.default_rng(0).integers(0, 256, (10, 3))]
    write_gif(tmp_path / "a.gif", film, fps=20)
    frames, durations, _ = read_gif(tmp_path / "a.gif")
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
    assert read_gif(tmp_path / "a.gif")[2] is None
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
    assert not list(tmp_path.iterdir())


def test_names_are_drawn_in_chinese():
    """A font without the character would draw the same box for every name."""
    font = chinese_font(20)
    assert len({bytes(font.getmask(character)) for character in "番茄炒蛋"}) == 4
    sheet = contact_sheet([[np.full((64, 64, 3), 200, np.uint8)] * 2] * 3, ["番茄炒鸡蛋", "土豆汤", "清炒生菜"], columns=2, side=64)
    assert np.asarray(sheet).min() < 60                                     # the names; all else is bright


def test_a_mosaic_shows_films_side_by_side_with_their_names():
    films = [[np.full((32, 32, 3), 10 * i + k, np.uint8) for k in range(4)] for i in range(3)]
    frames = mosaic(films, ["番茄汤", "土豆汤", "清炒生菜"], columns=2, side=32)
    assert len(frames) == 4 and len({frame.shape for frame in frames}) == 1
    assert all((frames[k] == 20 + k).all(axis=2).sum() >= 32 * 32 for k in range(4))
    with pytest.raises(ValueError, match="4, 2"):
        mosaic([films[0], films[1][:2]], ["番茄汤", "土豆汤"])
