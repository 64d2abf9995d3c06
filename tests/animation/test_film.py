import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from easy_diffusion.animation import camera
from easy_diffusion.animation.film import (
    FORMATS,
    animate,
    inpaint_nested,
    inpaint_strip,
    mosaic,
    write_film,
    write_gif,
)
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.inpainting.repaint import make_inpainter
from easy_diffusion.inpainting.stable_diffusion_inpainter import make_inpainter_from_networks
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.unet import UNet

SIZES = [(64, 64), (64, 48), (37, 53)]                  # (W, H)


def inpaint_grey(image, mask):
    return np.where(mask[..., None], np.uint8(200), image)


def make_inpainters():
    """Two inpainters with untrained networks, for images of any size: RePaint on pixels, and Stable
    Diffusion's inpainting model."""
    torch.manual_seed(0)
    network = UNet(channels=(32, 64), patch=4)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    inpainting_network = UNet(9, 4, (32, 64), context_dim=16).eval()
    autoencoder = Autoencoder((32, 32), scale=0.2).eval()
    repaint_inpainter = make_inpainter(
        diffusion.denoiser(network.eval()),
        diffusion.schedule,
        steps=3,
        jump=1,
        resamples=2,
        size_multiple=network.size_multiple,
    )
    sd_inpainter = make_inpainter_from_networks(
        inpainting_network,
        autoencoder,
        torch.randn(1, 5, 16),
        torch.zeros(1, 5, 16),
        size=32,
        steps=2,
    )
    return {"RePaint": repaint_inpainter, "Stable Diffusion": sd_inpainter}


INPAINTERS = make_inpainters()


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def image(request):
    """A smooth random image."""
    w, h = request.param
    shape = (h // 20 + 1, w // 20 + 1, 3)
    small = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(request.param, Image.Resampling.BICUBIC))


def read_with_pillow(path):
    """The frames as RGB, their durations in milliseconds, and the file's loop count."""
    frames, durations = [], []
    with Image.open(path) as pil_film:
        for frame in ImageSequence.Iterator(pil_film):
            frames.append(np.asarray(frame.convert("RGB")))
            durations.append(frame.info["duration"])
        return frames, durations, pil_film.info.get("loop")


def count_frames_with_ffmpeg(path):
    """The number of frames that ffmpeg decodes."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"]
    log = subprocess.run(command, capture_output=True, text=True).stderr
    return int(log.rsplit("frame=", 1)[1].split()[0])


# ---------------------------------------------------------------- animate


@pytest.mark.parametrize("name", INPAINTERS)
@pytest.mark.parametrize("move", camera.MOVES)
def test_every_move_gives_files_that_pillow_and_ffmpeg_read(image, move, name, tmp_path):
    film = animate(image, move, INPAINTERS[name], seconds=1.2, fps=10)
    h, w = image.shape[:2]
    assert len(film) == 12
    assert all(frame.shape == (h, w, 3) and frame.dtype == np.uint8 for frame in film)
    for ending in FORMATS:
        write_film(tmp_path / f"番茄汤.{ending}", film, fps=10)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["番茄汤.gif", "番茄汤.mp4", "番茄汤.webp"]

    gif, gif_durations, gif_loop = read_with_pillow(tmp_path / "番茄汤.gif")
    webp, webp_durations, webp_loop = read_with_pillow(tmp_path / "番茄汤.webp")
    assert gif_durations == webp_durations == [100] * 12
    assert gif_loop == webp_loop == 0                   # for ever
    mp4 = iio.imread(tmp_path / "番茄汤.mp4")
    metadata = iio.immeta(tmp_path / "番茄汤.mp4")
    assert metadata["fps"] == 10
    assert metadata["duration"] == pytest.approx(1.2, abs=0.01)
    assert len(mp4) == 12
    assert count_frames_with_ffmpeg(tmp_path / "番茄汤.gif") == 12
    assert count_frames_with_ffmpeg(tmp_path / "番茄汤.mp4") == 12
    # ffmpeg does not decode animated WebP.

    # Of all original frames, each decoded one is nearest to its own.
    for decoded in (gif, webp, mp4[:, :h, :w]):
        differences = np.stack(decoded)[:, None].astype(np.int16) - np.stack(film)
        distances = np.abs(differences).mean(axis=(2, 3, 4))            # [decoded, original]
        assert distances.diagonal().max() < 20
        assert (distances.diagonal() <= distances.min(axis=1) + 0.3).all()


@pytest.mark.parametrize("move", camera.MOVES)
def test_the_number_of_inpaintings_does_not_depend_on_the_number_of_frames(image, move):
    calls = {"circle": 1, "centre": 4}.get(move, 9 if "-" in move else 3)
    for fps in (5, 20):
        masks = []

        def inpaint(view, mask, masks=masks):
            assert view.shape == image.shape
            assert mask.shape == view.shape[:2]
            assert mask.dtype == bool
            assert (view[mask] == 127).all()
            masks.append(mask)
            return inpaint_grey(view, mask)

        film = animate(
            image, move, inpaint, inpaintings=3, pixels=5, seconds=2, fps=fps, size=(96, 80)
        )
        assert len(masks) == calls
        assert all(mask.any() and not mask.all() for mask in masks)
        assert len(film) == 2 * fps
        assert film[0].shape == (80, 96, 3)


@pytest.mark.parametrize("move", camera.DIRECTIONS)
def test_a_strip_is_inpainted_through_the_views_of_the_camera(image, move):
    """An inpainter that knows the wall around the image reconstructs the wall; for up, down, left
    and right each window is what `uncover` shows."""
    h, w = image.shape[:2]
    dx, dy = camera.DIRECTIONS[move]
    wall = np.random.default_rng(1).integers(0, 256, (3 * h, 3 * w, 3), dtype=np.uint8)
    wall[h:2 * h, w:2 * w] = image
    windows = iter(camera.pan_windows(move, 6, 3))
    views = [image]

    def inpaint(view, mask):
        x, y = next(windows)
        truth = wall[h + y:2 * h + y, w + x:2 * w + x]
        assert np.array_equal(view[~mask], truth[~mask])
        if "-" not in move:
            expected_view, expected_mask = camera.uncover(views[-1], move, 6)
            assert np.array_equal(view, expected_view)
            assert np.array_equal(mask, expected_mask)
        views.append(np.where(mask[..., None], truth, view))
        return views[-1]

    canvas, (x0, y0) = inpaint_strip(image, move, inpaint, 3, 6)
    assert next(windows, None) is None                  # all windows were inpainted
    assert (x0, y0) == (18 * (dx < 0), 18 * (dy < 0))
    # What the camera never shows stays grey.
    expected = np.full((h + 18 * abs(dy), w + 18 * abs(dx), 3), 127, np.uint8)
    for x, y in [(0, 0), *camera.pan_windows(move, 6, 3)]:
        truth = wall[h + y:2 * h + y, w + x:2 * w + x]
        expected[y0 + y:y0 + y + h, x0 + x:x0 + x + w] = truth
    assert np.array_equal(canvas, expected)


def test_each_nested_image_contains_the_next(image):
    images, boxes = inpaint_nested(image, inpaint_grey, inpaint_grey, 2, 4)
    assert len(images) == len(boxes) == 3
    closed, widest, wider = images
    for outer, inner, box in (
        (closed, widest, boxes[0]),
        (widest, wider, boxes[1]),
        (wider, image, boxes[2]),
    ):
        left, top, right, bottom = box
        pil_inner = Image.fromarray(inner)
        scaled = pil_inner.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        assert np.array_equal(outer[top:bottom, left:right], np.asarray(scaled))


@pytest.mark.parametrize("move", camera.MOVES)
def test_a_loop_has_no_jump_forwards_or_backwards(move):
    """The change from the last frame to the first: for a pan as small as that from the first to the
    second, since a pan is slow where it turns; for the others like those before and after it."""
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([3 * x, 3 * y, x + y], axis=-1).astype(np.uint8)

    def inpaint(view, mask):
        return np.where(mask[..., None], np.uint8(127), view)

    def make_film(**options):
        return animate(smooth, move, inpaint, pixels=4, seconds=2, fps=10, **options)

    film = make_film()
    changes = [
        np.abs(frame.astype(int) - next_frame).mean()
        for frame, next_frame in zip(film, film[1:] + film[:1])
    ]
    if move in camera.DIRECTIONS:
        assert changes[-1] == pytest.approx(changes[0], abs=0.02)
        assert changes[-1] < 0.2 * max(changes)
    else:
        assert changes[-1] < 1.2 * max(changes[-2], changes[0])
    backwards = film[:1] + film[:0:-1]
    for frame, expected in zip(make_film(reverse=True), backwards):
        assert np.array_equal(frame, expected)


def test_a_name_is_turned_into_an_image_by_generate():
    names = []

    def generate(name):
        names.append(name)
        return np.zeros((48, 64, 3), np.uint8)

    film = animate("番茄汤", "up", inpaint_grey, generate=generate, seconds=1, fps=5)
    assert len(film) == 5
    assert names == ["番茄汤"]


@pytest.mark.parametrize("move, expected", [
    ("right", ["inpaint"]),
    ("circle", ["inpaint_around"]),
    ("centre", ["inpaint_around", "inpaint"]),
])
def test_the_frame_around_the_image_may_have_its_own_inpainter(move, expected):
    calls = []

    def inpaint(view, mask):
        calls.append("inpaint")
        return inpaint_grey(view, mask)

    def inpaint_around(view, mask):
        calls.append("inpaint_around")
        return inpaint_grey(view, mask)

    image = np.zeros((48, 64, 3), np.uint8)
    animate(image, move, inpaint, inpaint_around=inpaint_around, seconds=1, fps=4)
    assert calls == expected


def test_wrong_arguments_of_animate_are_named():
    image = np.zeros((48, 64, 3), np.uint8)
    for wrong_image, move, message in (
        ("番茄汤", "up", "generate"),
        (image, "sideways", "sideways"),
        (image[0], "up", "uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            animate(wrong_image, move, inpaint_grey)
    for options, message in (
        (dict(inpaintings=0), "not 0"),
        (dict(seconds=-3), "-3"),
        (dict(fps=0), "4.0, 0"),
        (dict(pixels=0), "not 0"),
        (dict(size=(0, 5)), r"\(0, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            animate(image, "up", inpaint_grey, **options)


# ---------------------------------------------------------------- files


def test_the_frames_of_a_gif_share_one_palette_that_suits_all_of_them(tmp_path):
    """Ten frames of ten colours: each colour is within 2% of 256 levels, and no frame has a palette
    of its own."""
    colours = np.random.default_rng(0).integers(0, 256, (10, 3))
    film = [np.full((40, 40, 3), colour, np.uint8) for colour in colours]
    write_gif(tmp_path / "a.gif", film, fps=20)
    frames, durations, _ = read_with_pillow(tmp_path / "a.gif")
    assert durations == [50] * 10
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames, film)]
    assert max(errors) < 5

    # In the file, a graphic control extension (21 F9 04) precedes each image descriptor (2C), whose
    # last byte has bit 7 set if the image has its own palette.
    data = (tmp_path / "a.gif").read_bytes()
    blocks = data.split(b"\x21\xf9\x04")[1:]
    flags = [block[block.index(b"\x2c") + 9] for block in blocks]
    assert len(blocks) == 10
    assert not any(flag & 0x80 for flag in flags)


def test_a_film_may_play_once(tmp_path):
    image = np.arange(64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    film = [np.roll(image, i, axis=1) for i in range(5)]
    write_film(tmp_path / "a.gif", film, fps=10, loop=False)
    write_film(tmp_path / "a.webp", film, fps=10, loop=False)
    assert read_with_pillow(tmp_path / "a.gif")[2] is None
    with Image.open(tmp_path / "a.webp") as webp:
        assert webp.info["loop"] == 1


def test_an_mp4_keeps_colours_and_pads_odd_sides(tmp_path):
    film = [np.full((37, 53, 3), (200, 60, 90), np.uint8)] * 8
    write_film(tmp_path / "a.mp4", film, fps=8)
    decoded = iio.imread(tmp_path / "a.mp4")
    assert decoded.shape == (8, 38, 54, 3)
    assert np.abs(decoded.astype(int) - (200, 60, 90)).max() < 6


def test_unknown_formats_and_empty_films_are_refused(tmp_path):
    film = [np.zeros((8, 8, 3), np.uint8)]
    for path, frames in ((tmp_path / "a.avi", film), (tmp_path / "a.gif", [])):
        with pytest.raises(ValueError, match="gif, mp4, webp"):
            write_film(path, frames)
    with pytest.raises(ValueError, match="not -5"):
        write_film(tmp_path / "a.gif", film, fps=-5)
    assert not list(tmp_path.iterdir())


def test_equal_successive_frames_keep_their_total_duration(tmp_path):
    film = [np.full((16, 16, 3), level, np.uint8) for level in (10, 10, 10, 90, 200)]
    for ending in ("gif", "webp"):
        write_film(tmp_path / f"a.{ending}", film, fps=10)
        assert sum(read_with_pillow(tmp_path / f"a.{ending}")[1]) == 500


def test_a_mosaic_shows_films_side_by_side_with_captions():
    films = [[np.full((32, 32, 3), 10 * i + k, np.uint8) for k in range(4)] for i in range(3)]
    frames = mosaic(films, ["番茄汤", "土豆汤", "清炒生菜"], columns=2, side=32)
    assert len(frames) == 4
    assert len({frame.shape for frame in frames}) == 1
    for k in range(4):                                  # the third film's frame is there
        assert (frames[k] == 20 + k).all(axis=2).sum() >= 32 * 32
    with pytest.raises(ValueError, match="4, 2"):
        mosaic([films[0], films[1][:2]], ["番茄汤", "土豆汤"])


@pytest.mark.parametrize("ending", ["gif", "webp", "mp4"])
@pytest.mark.parametrize(
    "shape, dtype",
    [((16, 16, 4), np.uint8), ((16, 16), np.uint8), ((16, 16, 3), np.float32)],
    ids=["RGBA", "grey", "float"],
)
def test_frames_of_another_form_are_refused_in_every_format(tmp_path, ending, shape, dtype):
    frames = [np.zeros((16, 16, 3), np.uint8), np.zeros(shape, dtype)]
    with pytest.raises(ValueError, match=r"frames must be arrays uint8 \[H, W, 3\] .* frame 1 is"):
        write_film(tmp_path / f"film.{ending}", frames)
    assert not list(tmp_path.iterdir())


def test_frames_of_different_sizes_are_refused(tmp_path):
    frames = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)]
    with pytest.raises(ValueError, match="frame 1 is uint8 .16, 18, 3."):
        write_film(tmp_path / "film.gif", frames)
