"""Views of photographs: their crops, and the store that holds them."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.aipos import AiposFood
from datasets.photo_views import SMALLEST_CROP, PhotoViews, build_view_store


@pytest.fixture
def folder(tmp_path):
    """A photograph of 90×60 pixels whose colours are its coordinates, in two dishes."""
    for name in ("土豆汤", "番茄炒鸡蛋"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = np.zeros((60, 90, 3), np.uint8)
        pixels[..., 0] = 2 * np.arange(90)
        pixels[..., 1] = 4 * np.arange(60)[:, None]
        pixels[..., 2] = 255 * (name == "土豆汤")
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "1.png")
    return tmp_path / "photos"


def test_the_first_view_is_the_middle_of_each_photograph(folder):
    photos = AiposFood(folder, size=32)
    views = PhotoViews(photos, views=3)
    assert len(views) == 6
    for i in range(2):
        assert torch.equal(views[i][0], photos[i][0])
        assert [views[i + 2 * k][1] for k in range(3)] == [photos[i][1]] * 3


def test_the_other_views_are_squares_of_different_size_and_position(folder):
    views = PhotoViews(AiposFood(folder, size=32), views=50)
    left, top, side = [], [], []
    for index in range(2, len(views), 2):
        image = views[index][0].float()
        left.append(image[0, 16, 1].item() / 2)                     # colours are coordinates
        top.append(image[1, 1, 16].item() / 4)
        side.append((image[0, 16, -2].item() - image[0, 16, 1].item()) / 2 * 32 / 29)
    assert min(left) < 10 and max(left) > 30                        # of 0 to 42
    assert min(top) < 3 and max(top) > 7                            # of 0 to 12
    assert 60 * SMALLEST_CROP - 2 < min(side) < 51 and 57 < max(side) < 62


def test_a_view_is_always_the_same(folder):
    photos = AiposFood(folder, size=32)
    torch.manual_seed(0)
    first = PhotoViews(photos, 3)[5][0]
    torch.manual_seed(1)
    assert torch.equal(PhotoViews(photos, 3)[5][0], first)
    assert not torch.equal(PhotoViews(photos, 3)[3][0], first)


def test_an_index_or_a_number_of_views_out_of_range(folder):
    photos = AiposFood(folder, size=32)
    with pytest.raises(ValueError, match="1 or more, not 0"):
        PhotoViews(photos, 0)
    with pytest.raises(IndexError, match="view 6 of 6"):
        PhotoViews(photos, 3)[6]


def test_the_store_holds_all_views_and_is_extended(folder, tmp_path):
    photos = AiposFood(folder, size=32)
    first = build_view_store(photos, tmp_path / "store", views=2)
    assert len(first) == 4
    store = build_view_store(photos, tmp_path / "store", views=3)
    expected = PhotoViews(photos, 3)
    assert len(store) == 6
    for i in range(6):
        assert torch.equal(store[i][0], expected[i][0]) and store[i][1] == expected[i][1]


def test_a_store_of_other_photographs_is_refused(folder, tmp_path):
    photos = AiposFood(folder, size=32)
    build_view_store(photos, tmp_path / "store", views=2)
    with pytest.raises(ValueError, match="holds other photographs or views"):
        build_view_store(photos, tmp_path / "store", views=1)
    next(folder.glob("*/1.png")).unlink()
    with pytest.raises(ValueError, match="holds other photographs or views"):
        build_view_store(AiposFood(folder, size=32), tmp_path / "store", views=4)
