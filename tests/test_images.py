import numpy as np
import pytest
import torch

from easy_diffusion.images import contact_sheet, load_chinese_font, show_images, to_uint8


def test_captions_are_drawn_with_chinese_characters():
    """A font without these characters would draw the same box for each of them."""
    font = load_chinese_font(20)
    assert len({bytes(font.getmask(character)) for character in "番茄炒蛋"}) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("easy_diffusion.images.FONTS", ())
        with pytest.raises(OSError, match="mplfonts"):
            load_chinese_font(20)
    image = np.full((64, 64, 3), 200, np.uint8)
    captions = ["番茄炒鸡蛋", "土豆汤", "清炒生菜"]
    sheet = contact_sheet([[image] * 2] * 3, captions, columns=2, side=64)
    assert np.asarray(sheet).min() < 60                 # the captions; everything else is bright


def test_a_contact_sheet_has_no_empty_columns():
    image = np.zeros((32, 32, 3), np.uint8)
    sheet = contact_sheet([[image]] * 2, ["番茄汤", "土豆汤"], columns=4, side=32)
    assert sheet.size == (2 * 35 + 3, 32 + 24 + 3)


def test_grey_samples_become_grey_images_and_other_channels_are_refused():
    x = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    images = to_uint8(x)
    assert images.shape == (2, 4, 4, 3)
    assert (images == images[..., :1]).all()
    assert (images[0, 0, 0, 0], images[1, 3, 3, 0]) == (0, 255)
    with pytest.raises(ValueError, match="not .2, 4, 4, 4."):
        to_uint8(torch.zeros(2, 4, 4, 4))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_a_contact_sheet_shows_grey_and_coloured_images(shape):
    sheet = np.asarray(contact_sheet([[np.full(shape, 100, np.uint8)]], ["汤"], side=32))
    assert (sheet[10, 20] == 100).all()


def test_a_contact_sheet_refuses_floats_and_four_channels():
    for image in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match="images must be uint8"):
            contact_sheet([[image]], ["汤"])


def test_each_grey_level_comes_back_from_minus_1_to_1_unchanged():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = to_uint8(levels.float() / 127.5 - 1)
    assert np.array_equal(images[0, :, :, 0], levels[0, 0].numpy())
    assert to_uint8(torch.full((1, 1, 1, 1), 0.4 / 127.5)).max() == 128     # of 127.9


@pytest.mark.parametrize("tall", [False, True])
def test_a_contact_sheet_shows_a_long_image_in_the_middle_of_its_square(tall):
    """Square and gap have 64 and 6 pixels; the image is scaled to 64 × 16."""
    image = np.zeros((32, 128, 3), np.uint8)
    sheet = contact_sheet([[image.transpose(1, 0, 2) if tall else image]], [""], side=64)
    square = np.asarray(sheet)[6:70, 6:70, 0]
    square = square.T if tall else square
    assert (square[24:40] == 0).all()
    assert (square[:24] == 255).all()
    assert (square[40:] == 255).all()


def test_show_images_takes_tensors_and_arrays():
    array = np.full((16, 16, 3), 255, np.uint8)
    array[:8] = 0
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    samples = pixels[None].float() / 127.5 - 1
    sheets = [show_images(images, side=32) for images in ([array], [pixels], pixels[None], samples)]
    for sheet in sheets:
        assert sheet.mode == "P" and sheet.size == (32 + 2 * 3, 32 + 2 * 3)
        colours = np.asarray(sheet.convert("RGB"))
        assert (colours[6, 20] == 0).all() and (colours[32, 20] == 255).all()
    sheet = show_images([array] * 3, ["汤", "面", "饭"], columns=2, side=32)
    assert sheet.size[1] == 2 * (32 + 24) + 3


@pytest.mark.parametrize("side", [32, 64, 96, 128])
def test_a_caption_is_not_cut_off(side):
    """Its descenders do not reach the images of the next row, nor the edge of the sheet."""
    image = np.full((side, side, 3), 255, np.uint8)
    sheet = np.asarray(contact_sheet([[image]], ["gyp"], side=side).convert("L"))
    assert (sheet < 128).any()
    assert (sheet[-2:] == 255).all()
