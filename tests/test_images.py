import numpy as np
import pytest

from easy_diffusion.images import contact_sheet, load_chinese_font


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
    assert sheet.size == (2 * 35 + 3, 43)
