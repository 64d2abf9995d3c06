import numpy as np
import pytest

from easy_diffusion.animation.camera import uncover
from easy_diffusion.inpainting.blending import blend, fill_from_neighbours, pad_to_multiple


def test_masked_pixels_are_filled_from_their_known_neighbours():
    image = np.zeros((8, 10, 3), np.uint8)
    image[:, :5] = (200, 100, 50)
    image[:, 5:] = 255
    mask = np.zeros((8, 10), bool)
    mask[:, 5:] = True
    all_masked = np.ones((8, 10), bool)
    assert (fill_from_neighbours(image, mask) == (200, 100, 50)).all()
    assert (fill_from_neighbours(image, all_masked) == 127).all()
    assert np.array_equal(fill_from_neighbours(image, ~all_masked), image)


def decode_darker(image, seed):
    """Stands for an inpainter's decoder: 2 levels darker in red, 1 brighter in blue, and noisy."""
    noise = np.random.default_rng(seed).normal(0, 4, image.shape)
    return np.clip(image + [-2.0, -0.4, 1.0] + noise, 0, 255)


def outpaint_right(place, calls=40):
    """Moves a camera to the right over a wall of one texture, and measures each inpainted strip.

    place: (decoded, image, mask) → image.

    Returns for each strip the difference of its mean from its own texture's, in levels, and the
    ratio of their standard deviations: [calls, 3] each.
    """
    texture = np.random.default_rng(0).integers(100, 140, (48, 48, 3), dtype=np.uint8)
    image = texture
    mean_errors, std_ratios = [], []
    for k in range(calls):
        view, mask = uncover(image, "right", 12)
        # A perfect inpainting, before it is decoded.
        wall = np.where(mask[..., None], np.roll(texture, 5 * k, axis=1), view)
        image = place(decode_darker(wall, k), view, mask)
        strip = image[:, -12:].astype(float)
        mean_errors.append((strip - wall[:, -12:]).mean(axis=(0, 1)))
        std_ratios.append(strip.std(axis=(0, 1)) / wall[:, -12:].std(axis=(0, 1)))
    return np.array(mean_errors), np.array(std_ratios)


def paste_without_blending(decoded, image, mask):
    return np.where(mask[..., None], decoded.round().astype(np.uint8), image)


def test_colour_errors_of_a_decoder_are_corrected_in_each_of_40_inpaintings():
    """The mean of a strip stays within 1 level of 256 of its texture's, and the mean error over all
    strips within 0.2, so that nothing adds up; the standard deviation within 15% (it includes the
    decoder's noise). Pasted without blending, each strip is wrong by 2 levels."""
    mean_errors, std_ratios = outpaint_right(blend)
    assert np.abs(mean_errors).max() < 1
    assert np.abs(mean_errors.mean(axis=0)).max() < 0.2
    assert np.abs(std_ratios - 1).max() < 0.15
    pasted_errors, _ = outpaint_right(paste_without_blending)
    assert np.abs(pasted_errors[:, 0] + 2).max() < 0.5


def outpaint_by_mirroring(decoder, inpaintings=40, place=blend):
    """Moves a camera to the right by a quarter of the image each time; the new quarter is the
    mirror image of its neighbour, with colours changed by the decoder.

    Returns mean and standard deviation of the last quarter, before each inpainting and after the
    last one: [2, inpaintings + 1, 3].
    """
    rng = np.random.default_rng(1)
    image = rng.normal((150, 110, 80), 12, (256, 64, 3)).round().astype(np.uint8)
    moments = []
    for _ in range(inpaintings + 1):
        strip = image[:, -16:].astype(float)
        moments.append((strip.mean(axis=(0, 1)), strip.std(axis=(0, 1))))
        view, mask = uncover(image, "right", 16)
        mirrored = view.astype(np.float32)
        mirrored[:, 48:] = mirrored[:, 47:31:-1]
        image = place(decoder(mirrored), view, mask)
    return np.array(moments).swapaxes(0, 1)


DECODERS = [(lambda x: x - 3, 75), (lambda x: x * 0.99, 30)]


@pytest.mark.parametrize("decoder, drift", DECODERS, ids=["3 levels darker", "1% flatter"])
def test_colours_do_not_drift_over_40_inpaintings(decoder, drift):
    """The decoder alone moves the colours by more than `drift` levels. Blended, their mean stays
    within half a level, their standard deviation within 2%."""
    mean, _ = outpaint_by_mirroring(decoder, place=paste_without_blending)
    assert np.abs(mean[-1] - mean[0]).max() > drift
    mean, std = outpaint_by_mirroring(decoder)
    assert np.abs(mean - mean[0]).max() < 0.5
    assert np.abs(std / std[0] - 1).max() < 0.02


def test_blending_closes_the_seam_and_changes_no_pixel_outside_the_mask():
    """The decoder is wrong by 30 levels on the left and by 10 on the right. At the seam the local
    error is corrected; far from it, the mean error."""
    image = np.full((40, 80, 3), 100, np.uint8)
    mask = np.zeros((40, 80), bool)
    mask[:, 20:60] = True
    known_pixels = int((~mask).sum())
    image[~mask] += np.random.default_rng(0).integers(0, 9, (known_pixels, 3), dtype=np.uint8)
    error = np.where(np.arange(80) < 40, -30, -10)[None, :, None]
    inpainted = np.full((40, 80, 3), 100.0) + error + 4

    blended = blend(inpainted, image, mask, width=8)
    assert np.array_equal(blended[~mask], image[~mask])
    assert abs(blended[:, 20].mean() - 104) < 1.5
    assert abs(blended[:, 59].mean() - 104) < 1.5
    columns = blended[:, 20:60].astype(int).mean(axis=(0, 2))
    assert np.abs(np.diff(columns)[:15]).max() < 2.5                    # it fades without a step
    assert abs(blended[:, 30:36].mean() - (inpainted[:, 30:36].mean() + 20)) < 1


def test_blending_with_an_empty_or_a_full_mask():
    rng = np.random.default_rng(0)
    image = rng.integers(100, 109, (40, 80, 3), dtype=np.uint8)
    inpainted = np.full(image.shape, 84.0)
    empty = np.zeros((40, 80), bool)
    assert np.array_equal(blend(inpainted, image, empty), image)
    for level, expected in ((258.7, 255), (-3.2, 0), (200.9, 201)):
        assert (blend(np.full(image.shape, level), image, ~empty) == expected).all()


def test_blending_refuses_an_inpainted_image_of_another_shape():
    image = np.zeros((40, 80, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\[40, 80, 3\], not \[40, 3\]"):
        blend(np.zeros((40, 3)), image, np.zeros((40, 80), bool))


def test_padding_repeats_the_edge_of_the_image_and_is_to_be_inpainted():
    image = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    mask = np.zeros((5, 6), bool)
    mask[1, 2] = True
    padded_image, padded_mask = pad_to_multiple(image, mask, 4)
    assert padded_image.shape == (8, 8, 3)
    assert np.array_equal(padded_image[:5, :6], image)
    assert np.array_equal(padded_image[5:, :6], np.stack([image[4]] * 3))
    assert np.array_equal(padded_image[:5, 7], image[:, 5])
    assert np.array_equal(padded_mask[:5, :6], mask)
    assert padded_mask[5:].all()
    assert padded_mask[:, 6:].all()
