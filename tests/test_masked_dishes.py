"""Examples for the inpainting ControlNet: masks are those of the moves, and what is shown fits."""

import numpy as np
import torch

from datasets.dishes import draw_dish
from easy_diffusion.animation.camera import MOVES, uncover
from easy_diffusion.masked_dishes import SEED_OF_SECOND, MaskedDishes, move_window

SIZE = 32


def find_move(mask):
    """All (move, distance) whose mask this is."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    found = []
    for move in MOVES:
        for distance in range(1, SIZE):
            try:
                other = uncover(image, move, distance)[1]
            except ValueError:              # too far for this move
                break
            if np.array_equal(mask, other):
                found.append((move, distance))
    return found


def test_each_mask_is_that_of_a_camera_move_and_shows_the_image_outside():
    dataset = MaskedDishes(40, SIZE)
    seen = set()
    for image, _, extras in (dataset[i] for i in range(40)):
        control = extras["control"]
        mask = (control[3] == 255).numpy()
        assert set(control[3].unique().tolist()) <= {0, 255}
        moves = find_move(mask)
        assert moves
        seen |= {move for move, _ in moves}
        assert torch.equal(control[:3, ~mask], image[:, ~mask])
        assert (control[:3, mask] == 127).all()
    assert len(seen) >= 8


def test_the_window_of_a_pan_shows_the_first_dish_where_it_was_and_the_second_beside_it():
    first, second = (
        draw_dish("番茄炒鸡蛋", SIZE, seed).transpose(1, 2, 0) for seed in (1, SEED_OF_SECOND)
    )
    right = move_window(first, second, 10, 0)
    assert np.array_equal(right[:, :-10], first[:, 10:])
    assert np.array_equal(right[:, -10:], second[:, :10])
    up_left = move_window(first, second, -4, -6)
    assert np.array_equal(up_left[6:, 4:], first[:-6, :-4])
    assert np.array_equal(up_left[:6, 4:], second[-6:, :-4])


def test_items_do_not_depend_on_the_order():
    a, b = MaskedDishes(9, SIZE, "held_out", seed=3), MaskedDishes(9, SIZE, "held_out", seed=3)
    for i in (5, 2):
        assert torch.equal(a[i][0], b[i][0])
        assert torch.equal(a[i][2]["control"], b[i][2]["control"])
