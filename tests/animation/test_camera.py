import math

import numpy as np
import pytest
from PIL import Image

from easy_diffusion.animation import camera

SIZES = [(64, 64), (64, 48), (37, 53)]                                      # (W, H): square, lying, standing and odd


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def picture(request):
    w, h = request.param
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("move", camera.DIRECTIONS)
@pytest.mark.parametrize("pixels", [1, 7])
def test_a_pan_shifts_what_is_kept_exactly_and_masks_all_else(picture, move, pixels):
    """By the definition, pixel by pixel: x'[i, j] = x[i + d·dy, j + d·dx] where that is in the picture, and masked where it is not."""
    moved, mask = camera.uncover(picture, move, pixels)
    h, w = picture.shape[:2]
    dx, dy = camera.DIRECTIONS[move]
    for i in range(h):
        for j in range(w):
            y, x = i + pixels * dy, j + pixels * dx
            inside = 0 <= y < h and 0 <= x < w
            assert mask[i, j] != inside
            if inside:
                assert (moved[i, j] == picture[y, x]).all()
    assert (moved[mask] == 127).all()


def test_circle_and_centre_scale_the_picture_keep_its_form_and_mask_what_is_around(picture):
    h, w = picture.shape[:2]
    for move, pixels in (("circle", 5), ("centre", 6)):
        moved, mask = camera.uncover(picture, move, pixels)
        left, top, right, bottom = camera.inner_box((w, h), move, pixels)
        small = Image.fromarray(picture).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        assert np.array_equal(moved[top:bottom, left:right], np.asarray(small)) and not mask[top:bottom, left:right].any()
        assert abs((right - left) / (bottom - top) - w / h) < 0.2           # whole pixels, of few
        outside = np.ones((h, w), bool)
        outside[top:bottom, left:right] = False
        if move == "circle":
            assert np.array_equal(mask, outside) and min(left, top) == pixels == min(w - right, h - bottom)
        else:
            around = math.ceil((right - left) / 2), math.ceil((bottom - top) / 2)
            ring = np.zeros((h, w), bool)
            ring[top - around[1]:bottom + around[1], left - around[0]:right + around[0]] = True
            assert np.array_equal(mask, ring & outside)
            assert np.array_equal(moved[~ring], picture[~ring])


def predecessors_mask(move, dim):
    """What the easy_diffusion of 2023 repainted at its factor of 4, for a square picture: s = dim // 4, m = s // 2."""
    s, mask = dim // 4, np.zeros((dim, dim), bool)
    m, c = s // 2, dim // 2
    if move == "circle":
        mask[:] = True
        mask[m:dim - m, m:dim - m] = False
    elif move == "centre":
        mask[c - s:c + s, c - s:c + s] = True
        mask[c - m:c + m, c - m:c + m] = False
    for word in move.split("-"):
        if word in ("up", "down", "left", "right"):
            mask[{"up": np.s_[:m], "down": np.s_[-m:], "left": np.s_[:, :m], "right": np.s_[:, -m:]}[word]] = True
    return mask


@pytest.mark.parametrize("dim", [64, 128, 512])
@pytest.mark.parametrize("move", camera.MOVES)
def test_the_predecessors_masks_are_ours_at_an_eighth_of_the_side(move, dim):
    moved, mask = camera.uncover(np.zeros((dim, dim, 3), np.uint8), move, dim // 8)
    assert np.array_equal(mask, predecessors_mask(move, dim))


def test_there_are_ten_moves():
    assert len(camera.MOVES) == 10 == len(set(camera.MOVES))


@pytest.mark.parametrize("move, pixels, most", [("right", 0, 63), ("right", 64, 63), ("up", 48, 47), ("up-left", 48, 47),
                                                ("circle", 24, 23), ("centre", 13, 12)])
def test_impossible_steps_are_named(move, pixels, most):
    picture = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=f"1 to {most} pixels, not {pixels}"):
        camera.uncover(picture, move, pixels)
    camera.uncover(picture, move, most)
    with pytest.raises(ValueError, match="3×2 pixels is too small for circle"):
        camera.uncover(np.zeros((2, 3, 3), np.uint8), "circle", 1)
    with pytest.raises(ValueError, match="64×48 pixels, .* not 48×48"):
        camera.uncover(picture, "centre", 4, inside=picture[:, :48])


def test_unknown_moves_and_pictures_of_another_form_are_named():
    picture = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="sideways"):
        camera.uncover(picture, "sideways", 4)
    for wrong in (picture.astype(float), picture[..., 0], np.zeros((4, 48, 64), np.uint8), None):
        with pytest.raises(ValueError, match="uint8"):
            camera.uncover(wrong, "right", 4)


@pytest.mark.parametrize("move", camera.DIRECTIONS)
def test_the_windows_of_a_way_cover_all_that_the_camera_sees(move):
    """Every view on the way, in tenths of a pixel, lies where a window was painted; the last window is the last view."""
    side, pixels, steps = 12, 5, 3
    places = [(0, 0), *camera.pan_windows(move, pixels, steps)]
    far = pixels * steps
    painted = np.zeros((side + 2 * far,) * 2, bool)
    for x, y in places:
        painted[far + y:far + y + side, far + x:far + x + side] = True
    dx, dy = camera.DIRECTIONS[move]
    for d in np.arange(0, far + 0.05, 0.1):
        y, x = far + d * dy, far + d * dx
        assert painted[math.floor(y):math.ceil(y + side), math.floor(x):math.ceil(x + side)].all()
    assert places[-1] == (far * dx, far * dy)


def test_pan_frames_begin_with_the_first_view_turn_at_the_last_and_come_back():
    canvas = np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    frames = list(camera.pan_frames(canvas, (0, 0), "right", 16, (16, 8), (16, 8), 10))
    assert np.array_equal(frames[0], canvas[:, :16]) and np.array_equal(frames[5], canvas[:, 16:])
    assert all(np.abs(frames[k].astype(int) - frames[-k]).max() <= 1 for k in range(1, 10))        # u and 1 - u differ by 1e-17


def ramp(w, h):
    """A picture whose brightness tells the place: 2 x in red, 2 y in green."""
    y, x = np.mgrid[:h, :w]
    return np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8)


def test_frames_move_by_parts_of_a_pixel():
    """Over a ramp of two levels a pixel the mean of a frame tells where the camera is: within half a level, to which it is rounded."""
    canvas, frames = ramp(96, 64), 40
    film = list(camera.pan_frames(canvas, (0, 0), "right", 32, (64, 64), (64, 64), frames))
    inner = np.s_[4:-4, 4:-4, 0]
    where = [frame[inner].astype(float).mean() for frame in film]
    wanted = 2 * 32 * camera.ease_back_and_forth(frames) + canvas[:, :64][inner].mean()
    assert np.abs(where - wanted).max() <= 0.5
    assert len(set(where)) >= 15                                            # of 21 places on the way


def test_the_circle_goes_round_at_one_speed_and_ends_where_it_began():
    outer = ramp(64, 64)
    small = np.asarray(Image.fromarray(outer[8:-8, 8:-8]).resize((64, 64), Image.Resampling.BICUBIC))
    film = list(camera.circle_frames(small, outer, 8, (64, 64), 16))
    x = np.array([frame[..., 0].astype(float).mean() for frame in film])
    y = np.array([frame[..., 1].astype(float).mean() for frame in film])
    angles = 2 * np.pi * np.arange(16) / 16
    assert np.abs(x - x.mean() - 2 * 8 * np.sin(angles)).max() < 0.6 and np.abs(y - y.mean() + 2 * 8 * np.cos(angles)).max() < 0.6
    steps = [np.abs(a.astype(float) - b).mean() for a, b in zip(film, film[1:] + film[:1])]
    assert max(steps) < 1.5 * min(steps)                                    # no jump from the last frame to the first


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_endless_zoom_meets_itself(size, count):
    """What would follow the last frame is the first one, at another scale: falling twice as deep gives the same film twice."""
    w, h = size
    pictures = [np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8) for i in range(count)]
    pictures = [np.asarray(Image.fromarray(p).resize((8, 8)).resize(size, Image.Resampling.BICUBIC)) for p in pictures]   # smooth ones
    boxes = [camera.inner_box(size, "centre", 6)] + [camera.inner_box(size, "circle", 4)] * (count - 1)
    twice = list(camera.zoom_frames(pictures * 2, boxes * 2, size, 48))     # the same fall, twice as deep
    once = list(camera.zoom_frames(pictures, boxes, size, 24))
    for k in range(24):
        assert np.array_equal(once[k], twice[k])
        assert np.abs(once[k].astype(int) - twice[24 + k]).max() <= 1
    assert np.array_equal(once[0][:2], pictures[0][:2])                     # it begins with the first picture, whole


def test_the_endless_zoom_shrinks_what_is_seen_by_equal_factors_about_the_point_that_stays():
    """Closed form, over a ramp whose box is off its middle: at u the window is s = (24 / 96)^u as wide, and its corner lies at
    box · (1 - s) / (1 - 24 / 96). The first pixel shows its middle, half a pixel of the frame farther in; within one level."""
    film = list(camera.zoom_frames([ramp(96, 96)], [(10, 20, 34, 44)], (96, 96), 8))
    for k, frame in enumerate(film):
        s = 0.25 ** (k / 8)
        for axis, edge in ((0, 10), (1, 20)):
            corner = edge * (1 - s) / 0.75
            assert abs(int(frame[0, 0, axis]) - 2 * (corner + s / 2 - 0.5)) <= 2


def test_in_the_middle_of_the_endless_zoom_lies_the_whole_again():
    """At the beginning the box holds the whole picture, small, and within that once more."""
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
    box = camera.inner_box((96, 96), "centre", 12)
    first = next(camera.zoom_frames([picture], [box], (96, 96), 8))
    small = np.asarray(Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC))
    inside = first[36:60, 36:60]
    again = slice(9, 15), slice(9, 15)                                      # of 24 pixels the middle 6
    rim = np.ones((24, 24), bool)
    rim[again] = False
    assert np.array_equal(inside[rim], small[rim])
    smaller = np.asarray(Image.fromarray(picture).resize((6, 6), Image.Resampling.BICUBIC))
    assert np.abs(inside[again].astype(int) - smaller)[:2].max() <= 1 and not np.array_equal(inside[again], small[again])
    assert np.array_equal(first[:30], picture[:30])
