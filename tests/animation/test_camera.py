import math

import numpy as np
import pytest
from PIL import Image

from easy_diffusion.animation import camera
from easy_diffusion.animation.film import animate, default_pixels, inpaint_strip

SIZES = [(64, 64), (64, 48), (37, 53)]                  # (W, H): square, landscape, odd portrait


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def image(request):
    w, h = request.param
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


# ---------------------------------------------------------------- what a move uncovers


@pytest.mark.parametrize("move", camera.DIRECTIONS)
@pytest.mark.parametrize("pixels", [1, 7])
def test_a_pan_shifts_visible_pixels_exactly_and_masks_all_others(image, move, pixels):
    """The definition, pixel by pixel: x'[i, j] = x[i + d·dy, j + d·dx], masked outside the
    image."""
    moved, mask = camera.uncover(image, move, pixels)
    h, w = image.shape[:2]
    dx, dy = camera.DIRECTIONS[move]
    for i in range(h):
        for j in range(w):
            y = i + pixels * dy
            x = j + pixels * dx
            inside = 0 <= y < h and 0 <= x < w
            assert mask[i, j] != inside
            if inside:
                assert (moved[i, j] == image[y, x]).all()
    assert (moved[mask] == 127).all()


@pytest.mark.parametrize("move", camera.BORDER_MOVES)
@pytest.mark.parametrize("pixels", [5, 6])
def test_circle_and_centre_scale_the_image_and_mask_the_region_around_it(image, move, pixels):
    h, w = image.shape[:2]
    moved, mask = camera.uncover(image, move, pixels)
    left, top, right, bottom = camera.inner_box((w, h), move, pixels)
    pil_image = Image.fromarray(image)
    scaled = pil_image.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    assert np.array_equal(moved[top:bottom, left:right], np.asarray(scaled))
    assert not mask[top:bottom, left:right].any()
    # The aspect ratio, rounded to whole pixels.
    assert abs((right - left) / (bottom - top) - w / h) < 0.2

    outside = np.ones((h, w), bool)
    outside[top:bottom, left:right] = False
    if move == "circle":
        assert np.array_equal(mask, outside)
        assert min(left, top) == pixels
        assert min(w - right, h - bottom) == pixels
    else:
        x_margin = math.ceil((right - left) / 2)
        y_margin = math.ceil((bottom - top) / 2)
        region = np.zeros((h, w), bool)
        region[top - y_margin:bottom + y_margin, left - x_margin:right + x_margin] = True
        assert np.array_equal(mask, region & outside)
        assert np.array_equal(moved[~region], image[~region])


def mask_of_2023(move, side):
    """What easy_diffusion of 2023 inpainted in a square image, at its factor of 4."""
    quarter = side // 4
    eighth = quarter // 2
    middle = side // 2
    strips = {
        "up": np.s_[:eighth],
        "down": np.s_[-eighth:],
        "left": np.s_[:, :eighth],
        "right": np.s_[:, -eighth:],
    }
    mask = np.zeros((side, side), bool)
    if move == "circle":
        mask[:] = True
        mask[eighth:side - eighth, eighth:side - eighth] = False
    elif move == "centre":
        mask[middle - quarter:middle + quarter, middle - quarter:middle + quarter] = True
        mask[middle - eighth:middle + eighth, middle - eighth:middle + eighth] = False
    for direction in move.split("-"):
        if direction in strips:
            mask[strips[direction]] = True
    return mask


@pytest.mark.parametrize("side", [64, 128, 512])
@pytest.mark.parametrize("move", camera.MOVES)
def test_at_an_eighth_of_the_side_the_masks_equal_those_of_2023(move, side):
    _, mask = camera.uncover(np.zeros((side, side, 3), np.uint8), move, side // 8)
    assert np.array_equal(mask, mask_of_2023(move, side))


def test_there_are_ten_moves():
    assert len(camera.MOVES) == 10
    assert len(set(camera.MOVES)) == 10


@pytest.mark.parametrize("move", camera.MOVES)
def test_impossible_distances_are_refused(move):
    image = np.zeros((48, 64, 3), np.uint8)
    most = {"left": 63, "right": 63, "circle": 23, "centre": 12}.get(move, 47)
    for pixels in (0, most + 1):
        with pytest.raises(ValueError, match=f"1 to {most} pixels, not {pixels}"):
            camera.uncover(image, move, pixels)
    camera.uncover(image, move, most)


@pytest.mark.parametrize("move", camera.MOVES)
def test_an_image_of_one_pixel_is_too_small_for_every_move(move):
    with pytest.raises(ValueError, match=f"1×1 pixels is too small for {move}"):
        camera.uncover(np.zeros((1, 1, 3), np.uint8), move, 1)


def test_impossible_sizes_are_refused():
    image = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="3×2 pixels is too small for circle"):
        camera.uncover(np.zeros((2, 3, 3), np.uint8), "circle", 1)
    with pytest.raises(ValueError, match="64×48 pixels, not 48×48"):
        camera.uncover(image, "centre", 4, inner_image=image[:, :48])


IMAGE = np.zeros((48, 64, 3), np.uint8)

TAKE_A_MOVE = {                                         # function → (the call, the moves it knows)
    "uncover": (lambda move: camera.uncover(IMAGE, move, 4), camera.MOVES),
    "inner_box": (lambda move: camera.inner_box((64, 48), move, 4), camera.BORDER_MOVES),
    "pan_windows": (lambda move: camera.pan_windows(move, 4, 1), camera.DIRECTIONS),
    "pan_frames": (
        lambda move: next(camera.pan_frames(IMAGE, (8, 8), move, 4, (32, 32), (32, 32), 2)),
        camera.DIRECTIONS,
    ),
    "animate": (lambda move: animate(IMAGE, move, lambda view, mask: view), camera.MOVES),
    "default_pixels": (lambda move: default_pixels(move, (64, 48)), camera.MOVES),
    "inpaint_strip": (
        lambda move: inpaint_strip(IMAGE, move, lambda view, mask: view, 1, 4),
        camera.DIRECTIONS,
    ),
}


@pytest.mark.parametrize("function", TAKE_A_MOVE)
def test_an_unknown_move_is_refused_with_its_name_and_the_known_moves(function):
    call, known = TAKE_A_MOVE[function]
    unknown = [move for move in camera.MOVES if move not in known]
    for move in ("sideways", "center", "", None, *unknown):
        with pytest.raises(ValueError) as error:
            call(move)
        assert str(error.value) == f"move must be one of {', '.join(known)}, not {move!r}"
    for move in known:
        call(move)


def test_wrong_images_are_refused():
    image = np.zeros((48, 64, 3), np.uint8)
    for wrong in (image.astype(float), image[..., 0], np.zeros((4, 48, 64), np.uint8), None):
        with pytest.raises(ValueError, match="uint8"):
            camera.uncover(wrong, "right", 4)


@pytest.mark.parametrize("move", camera.DIRECTIONS)
def test_the_windows_of_a_pan_cover_all_that_the_camera_shows(move):
    """Every view of the pan, in tenths of a pixel, is covered by the windows; the last window is
    the last view."""
    side, pixels, steps = 12, 5, 3
    distance = pixels * steps
    windows = [(0, 0), *camera.pan_windows(move, pixels, steps)]
    covered = np.zeros((side + 2 * distance,) * 2, bool)
    for x, y in windows:
        covered[distance + y:distance + y + side, distance + x:distance + x + side] = True
    dx, dy = camera.DIRECTIONS[move]
    for d in np.arange(0, distance + 0.05, 0.1):
        y = distance + d * dy
        x = distance + d * dx
        rows = slice(math.floor(y), math.ceil(y + side))
        columns = slice(math.floor(x), math.ceil(x + side))
        assert covered[rows, columns].all()
    assert windows[-1] == (distance * dx, distance * dy)


# ---------------------------------------------------------------- frames


def ramp(w, h):
    """An image whose pixels encode their position: 2 x in red, 2 y in green."""
    y, x = np.mgrid[:h, :w]
    return np.stack([2 * x, 2 * y, 0 * x], axis=-1).astype(np.uint8)


def test_pan_frames_start_at_the_first_view_and_return_from_the_last():
    canvas = np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    frames = list(camera.pan_frames(canvas, (0, 0), "right", 16, (16, 8), (16, 8), 10))
    assert np.array_equal(frames[0], canvas[:, :16])
    assert np.array_equal(frames[5], canvas[:, 16:])
    for k in range(1, 10):                              # the positions may differ by 1e-17
        assert np.abs(frames[k].astype(int) - frames[-k]).max() <= 1


def test_frames_move_by_fractions_of_a_pixel():
    """Over a ramp of two levels per pixel, the mean of a frame gives the position of the camera,
    within the half level of rounding."""
    canvas = ramp(96, 64)
    frames = 40
    film = list(camera.pan_frames(canvas, (0, 0), "right", 32, (64, 64), (64, 64), frames))
    inner = np.s_[4:-4, 4:-4, 0]
    means = [frame[inner].astype(float).mean() for frame in film]
    first_mean = canvas[:, :64][inner].mean()
    expected = 2 * 32 * camera.ease_back_and_forth(frames) + first_mean
    assert np.abs(means - expected).max() <= 0.5
    assert len(set(means)) >= 15                        # of 21 positions


def test_the_circle_has_constant_speed_and_closes():
    outer = ramp(64, 64)
    inner = Image.fromarray(outer[8:-8, 8:-8]).resize((64, 64), Image.Resampling.BICUBIC)
    film = list(camera.circle_frames(np.asarray(inner), outer, 8, (64, 64), 16))
    x = np.array([frame[..., 0].astype(float).mean() for frame in film])
    y = np.array([frame[..., 1].astype(float).mean() for frame in film])
    angles = 2 * np.pi * np.arange(16) / 16
    assert np.abs(x - x.mean() - 2 * 8 * np.sin(angles)).max() < 0.6
    assert np.abs(y - y.mean() + 2 * 8 * np.cos(angles)).max() < 0.6
    # No jump from the last frame to the first.
    differences = [
        np.abs(frame.astype(float) - next_frame).mean()
        for frame, next_frame in zip(film, film[1:] + film[:1])
    ]
    assert max(differences) < 1.5 * min(differences)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_infinite_zoom_repeats_seamlessly(size, count):
    """The frame after the last one is the first, at another scale: a zoom through the same images
    twice gives the same film twice."""
    w, h = size
    images = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)
        coarse = Image.fromarray(noise).resize((8, 8))
        images.append(np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)))    # smooth
    boxes = [camera.inner_box(size, "centre", 6)]
    boxes += [camera.inner_box(size, "circle", 4)] * (count - 1)
    twice = list(camera.zoom_frames(images * 2, boxes * 2, size, 48))
    once = list(camera.zoom_frames(images, boxes, size, 24))
    for k in range(24):
        assert np.array_equal(once[k], twice[k])
        assert np.abs(once[k].astype(int) - twice[24 + k]).max() <= 1
    assert np.array_equal(once[0][:2], images[0][:2])   # the first frame shows image 0 as a whole


def test_the_infinite_zoom_scales_the_view_by_a_constant_factor_about_the_fixed_point():
    """Closed form, over a ramp with a box that is not in its middle: at u the view is scaled by
    s = (24 / 96)^u, and its corner lies at box · (1 - s) / (1 - 24 / 96). The first pixel shows its
    own
    middle, half a pixel of the frame farther in; within one level."""
    film = list(camera.zoom_frames([ramp(96, 96)], [(10, 20, 34, 44)], (96, 96), 8))
    for k, frame in enumerate(film):
        s = 0.25 ** (k / 8)
        for axis, edge in ((0, 10), (1, 20)):
            corner = edge * (1 - s) / 0.75
            expected = 2 * (corner + s / 2 - 0.5)
            assert abs(int(frame[0, 0, axis]) - expected) <= 2


def test_the_box_of_the_infinite_zoom_shows_the_image_with_its_own_box():
    """In the first frame, the box shows the whole image, scaled down, with the image in its box."""
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = blocks.repeat(24, 0).repeat(24, 1)
    pil_image = Image.fromarray(image)
    box = camera.inner_box((96, 96), "centre", 12)
    first = next(camera.zoom_frames([image], [box], (96, 96), 8))
    assert np.array_equal(first[:30], image[:30])

    shown = first[36:60, 36:60]                         # the box
    scaled = np.asarray(pil_image.resize((24, 24), Image.Resampling.BICUBIC))
    inner_box = slice(9, 15), slice(9, 15)              # the middle 6 of 24 pixels
    outside = np.ones((24, 24), bool)
    outside[inner_box] = False
    assert np.array_equal(shown[outside], scaled[outside])
    scaled_twice = np.asarray(pil_image.resize((6, 6), Image.Resampling.BICUBIC))
    assert np.abs(shown[inner_box].astype(int) - scaled_twice)[:2].max() <= 1
    assert not np.array_equal(shown[inner_box], scaled[inner_box])


def test_a_view_outside_the_first_layer_is_refused():
    layer = Image.new("RGB", (90, 60)), (0, 0, 90, 60)
    assert camera.render_view([layer], (0, 0, 90, 60), (90, 60)).shape == (60, 90, 3)
    with pytest.raises(ValueError, match=r"view \(8, 12, 52, 78\) is not within"):
        camera.render_view([layer], (8, 12, 52, 78), (60, 90))
