import numpy as np
import pytest
from PIL import Image

from easy_diffusion import camera
from easy_diffusion.animate import animate, chinese_font, contact_sheet, walk, write_gif


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_right_shifts_what_is_kept_exactly_and_masks_the_rest(picture):
    moved, mask = camera.uncover(picture, "right", 10)
    assert moved.shape == picture.shape and mask.shape == (48, 64)
    assert np.array_equal(moved[:, :54], picture[:, 10:])
    assert mask[:, 54:].all() and not mask[:, :54].any()


def test_zoom_out_scales_the_picture_into_the_middle_and_masks_a_frame(picture):
    moved, mask = camera.uncover(picture, "zoom-out", 8)
    small = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(moved[8:-8, 8:-8], small)
    assert not mask[8:-8, 8:-8].any() and mask.sum() == 48 * 64 - 32 * 48


@pytest.mark.parametrize("move, pixels", [("right", 0), ("right", 64), ("zoom-out", 24), ("up-left", 4)])
def test_impossible_moves_are_named(picture, move, pixels):
    with pytest.raises(ValueError, match=move if move == "up-left" else str(pixels)):
        camera.uncover(picture, move, pixels)
    with pytest.raises(ValueError, match="uint8"):
        camera.uncover(picture.astype(float), "right", 4)


def test_the_strip_is_the_long_picture_that_the_camera_went_over():
    long = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    views = [long[:, x:x + 16] for x in (0, 8, 16, 24)]
    assert np.array_equal(camera.strip(views, 8), long)


def test_strip_frames_start_with_the_first_view_and_turn_at_the_last():
    long = np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    frames = list(camera.strip_frames(long, 16, (16, 8), 10))
    assert np.array_equal(frames[0], long[:, :16]) and np.array_equal(frames[5], long[:, 16:])


def test_pyramid_frames_start_with_the_first_picture_and_turn_at_the_last(picture):
    def paint(p, mask):
        return np.where(mask[..., None], np.uint8(9), p)
    pictures = walk(picture, "zoom-out", paint, repaints=3, pixels=6)
    frames = list(camera.pyramid_frames(pictures, 6, (64, 48), 12))
    assert np.array_equal(frames[0], pictures[0])
    assert np.abs(frames[6].astype(int) - pictures[3])[:5].max() == 0       # the rim; the middle is the sharper inner picture


def test_a_loop_has_no_jump():
    smooth = np.array(Image.linear_gradient("L").resize((64, 64)))[..., None].repeat(3, -1)
    for move in camera.MOVES:
        film = animate(smooth, move, lambda p, mask: p, repaints=2, seconds=2, fps=10, size=(64, 64))
        steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(film, film[1:] + film[:1])]
        assert steps[-1] <= max(steps[:-1])                                 # the last frame's successor is the first frame
        back = [np.abs(film[i].astype(int) - film[-i]).max() for i in range(1, 10)]
        assert max(back) <= 1                                               # there and back: u and 1 - u differ by 1e-17


@pytest.mark.parametrize("move", camera.MOVES)
def test_the_painter_is_called_once_a_repaint_whatever_the_number_of_frames(picture, move):
    calls = []
    def paint(p, mask):
        calls.append(mask)
        return p
    for fps in (5, 20):
        calls.clear()
        film = animate(picture, move, paint, repaints=3, seconds=2, fps=fps, size=(96, 80))
        assert len(calls) == 3 and len(film) == 2 * fps and film[0].shape == (80, 96, 3)


def test_the_gif_has_its_frames_its_duration_and_loops_forever(tmp_path, picture):
    film = [np.roll(picture, i, axis=1) for i in range(12)]
    write_gif(tmp_path / "番茄汤.gif", film, fps=10)
    with Image.open(tmp_path / "番茄汤.gif") as gif:
        assert gif.n_frames == 12 and gif.info["loop"] == 0 and gif.info["duration"] == 100 and gif.size == (64, 48)
    assert [path.name for path in tmp_path.iterdir()] == ["番茄汤.gif"]


def test_names_are_drawn_in_chinese():
    """A font without the character would draw the same box for every name."""
    font = chinese_font(20)
    boxes = {font.getmask(character).tobytes() if hasattr(font.getmask(character), "tobytes") else bytes(font.getmask(character))
             for character in "番茄炒蛋"}
    assert len(boxes) == 4
    sheet = contact_sheet([[np.full((64, 64, 3), 200, np.uint8)] * 2] * 3, ["番茄炒鸡蛋", "土豆汤", "清炒生菜"], columns=2, side=64)
    assert np.asarray(sheet).min() < 60                                     # the names; all else is bright
