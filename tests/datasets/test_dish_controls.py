"""Control images show the composition that the image was drawn from."""

import numpy as np
import pytest
import torch

from datasets.dish_controls import (
    CHANNELS,
    ControlledDishes,
    WithControl,
    edges_control,
    height_control,
    parts_control,
    sketch_control,
)
from datasets.dishes import Dishes, compose, draw_dish


@pytest.mark.parametrize("size", [64, 128, 200])
def test_a_composition_belongs_to_its_image(size):
    dish = compose("番茄炒鸡蛋", size, seed=3)
    assert np.array_equal(dish.image, draw_dish("番茄炒鸡蛋", size, seed=3))
    assert dish.height.shape == dish.parts.shape == (size, size)
    assert set(np.unique(dish.parts)) == {0, 1, 2, 3}
    # The corners are tabletop, and everything else is higher.
    assert dish.parts[0, 0] == dish.parts[-1, -1] == 0
    means = [dish.height[dish.parts == part].mean() for part in range(4)]
    assert means[0] + 0.05 < min(means[1:])


def test_the_first_ingredient_has_the_colour_of_the_first_name():
    """Tomatoes are redder than cucumbers, whichever comes first."""
    for name, red in (("番茄炒黄瓜", 2), ("黄瓜炒番茄", 3)):
        dish = compose(name, 64, seed=1)
        image = dish.image.astype(float)
        redness = [(image[0] - image[1])[dish.parts == part].mean() for part in (2, 3)]
        assert redness[red - 2] > redness[3 - red] + 30
    assert (compose("清炒番茄", 64, seed=1).parts < 3).all()


def test_parts_are_one_hot_and_swapped_in_half_of_the_dishes():
    dataset = ControlledDishes(60, 32, "parts")
    swapped = 0
    for index in range(60):
        _, _, extras = dataset[index]
        control = extras["control"]
        assert (control.int().sum(dim=0) == 255).all()
        name, seed = dataset.dishes.choose(index)
        parts = torch.from_numpy(compose(name, 32, seed).parts)
        if (control[3] > 0).any() and not torch.equal(control, parts_control(parts, False)):
            assert torch.equal(control, parts_control(parts, True))
            swapped += 1
    assert 15 < swapped < 45


@pytest.mark.parametrize("kind", CHANNELS)
def test_items_are_dishes_with_a_control(kind):
    dataset = ControlledDishes(5, 64, kind, split="held_out", seed=2)
    for index, (image, name) in enumerate(Dishes(5, 64, "held_out", 2)[i] for i in range(5)):
        item = dataset[index]
        assert torch.equal(item[0], image) and item[1] == name
        control = item[2]["control"]
        assert control.dtype == torch.uint8 and control.shape == (CHANNELS[kind], 64, 64)
        assert torch.equal(control, dataset[index][2]["control"])
    batch = next(iter(torch.utils.data.DataLoader(dataset, 5)))
    assert batch[2]["control"].shape == (5, CHANNELS[kind], 64, 64)


def test_edges_are_where_brightness_changes():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, 8:] = 255
    edges = edges_control(image)[0]
    assert (edges[:, 7:9] == 255).all()         # a step of 1 over two pixels: 0.5 a pixel
    assert (edges[:, :7] == 0).all() and (edges[:, 9:] == 0).all()
    ramp = torch.arange(0, 160, 10, dtype=torch.uint8).expand(3, 16, 16)
    expected = round(10 / 255 / 0.5 * 255)
    assert (edges_control(ramp)[0, :, 1:-1] == expected).all()


def test_height_and_sketch_are_scaled_to_grey_levels():
    height = torch.tensor([[0.0, 0.2], [0.4, 0.9]])
    assert height_control(height).tolist() == [[[0, 128], [255, 255]]]
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    sketch = sketch_control(image)[0]
    assert (sketch.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).float().std(dim=2) == 0).all()
    grey = torch.tensor([0.299, 0.587, 0.114]) @ image[:, :4, :4].float().flatten(1)
    assert abs(int(sketch[0, 0]) - grey.mean()) <= 0.51


def test_any_dataset_of_images_gets_edges(tmp_path):
    dataset = WithControl(Dishes(3, 64), "edges")
    image, _, extras = dataset[1]
    assert len(dataset) == 3 and torch.equal(extras["control"], edges_control(image))


def test_unknown_controls_are_named():
    with pytest.raises(ValueError, match="one of parts, height, edges, sketch, not 'depth'"):
        ControlledDishes(3, 64, "depth")
    with pytest.raises(ValueError, match="one of edges, sketch, not 'parts'"):
        WithControl(Dishes(3, 64), "parts")
