"""AiposFood: folders of photographs, damaged files, orientation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from datasets.aipos import AiposFood
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.trainer import train

HOWTOCOOK = Path(__file__).parents[3] / "shared" / "data" / "howtocook"


@pytest.fixture
def folder(tmp_path):
    """Two dishes with two photographs each."""
    for name, (width, height) in (("番茄炒鸡蛋", (90, 60)), ("土豆汤", (50, 80))):
        (tmp_path / name).mkdir()
        for i in range(2):
            rng = np.random.default_rng(i)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.jpg")
    return tmp_path


def test_each_folder_is_a_dish_name(folder):
    food = AiposFood(folder, size=32)
    assert len(food) == 4
    assert food.captions == ["土豆汤", "土豆汤", "番茄炒鸡蛋", "番茄炒鸡蛋"]
    assert food.skipped == 0
    image, caption = food[3]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert caption == "番茄炒鸡蛋"


def test_damaged_files_are_skipped_by_name_and_counted(folder):
    complete = (folder / "土豆汤" / "0.jpg").read_bytes()
    (folder / "土豆汤" / "half.jpg").write_bytes(complete[: len(complete) // 2])
    (folder / "土豆汤" / "notes.jpg").write_text("not an image")
    (folder / "土豆汤" / "empty.png").touch()
    with pytest.warns(UserWarning) as warnings:
        food = AiposFood(folder, size=32)
    assert len(food) == 4
    assert food.skipped == 3
    for name in ("half.jpg", "notes.jpg", "empty.png"):
        assert sum(name in str(warning.message) for warning in warnings) == 1
    assert len([food[i] for i in range(4)]) == 4


def test_a_photograph_is_rotated_upright_and_cropped_to_its_centre(tmp_path):
    (tmp_path / "汤").mkdir()
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255  # dark on the left, bright on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90° clockwise to display
    Image.fromarray(pixels).save(tmp_path / "汤" / "1.jpg", exif=exif)
    image, _ = AiposFood(tmp_path, size=32)[0]
    assert image[:, :12].float().mean() < 20
    assert image[:, 20:].float().mean() > 235


def test_errors_name_empty_and_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        AiposFood(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image in"):
        AiposFood(tmp_path)


@pytest.mark.skipif(not HOWTOCOOK.is_dir(), reason=f"no photographs of dishes at {HOWTOCOOK}")
def test_a_network_learns_from_real_photographs_in_a_few_steps():
    food = AiposFood(HOWTOCOOK, size=64)
    assert len(food) > 100
    assert food.skipped == 0
    torch.manual_seed(0)
    encoder = CharacterEncoder("".join(food.captions), dim=32, layers=1)
    network = UNet(channels=(32, 64), blocks=1, patch=4, context_dim=32, pooled=True)
    pairs = [food[i] for i in range(len(food))]
    loader = torch.utils.data.DataLoader(pairs, 16, shuffle=True, drop_last=True)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), "x0")
    steps = train(
        network,
        diffusion,
        loader,
        encoder,
        steps=40,
        learning_rate=2e-3,
        muon_learning_rate=3e-3,
        warmup=4,
        accelerator=Accelerator(),
    )
    losses = [step.loss for step in steps]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_half_of_the_accesses_mirror_left_and_right(folder):
    original, _ = AiposFood(folder, size=32)[0]
    flipping = AiposFood(folder, size=32, flip=True)
    torch.manual_seed(0)
    images = [flipping[0][0] for _ in range(30)]
    unflipped_count = sum(torch.equal(image, original) for image in images)
    flipped_count = sum(torch.equal(image, original.flip(2)) for image in images)
    assert unflipped_count + flipped_count == 30
    assert min(unflipped_count, flipped_count) > 5


@pytest.mark.parametrize("axis", [0, 1])
def test_a_random_crop_lies_anywhere_along_the_longer_side(tmp_path, axis):
    """The brightness rises from 0 to 239 along the longer side, of three squares."""
    (tmp_path / "汤").mkdir()
    levels = np.arange(240, dtype=np.uint8).repeat(80).reshape(240, 80)
    pixels = levels if axis == 0 else levels.T
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(tmp_path / "汤" / "1.png")
    torch.manual_seed(0)
    cropping = AiposFood(tmp_path, size=32, crop="random")
    means = torch.stack([cropping[0][0].float().mean() for _ in range(40)])
    # The mean of a square is that of its middle, 40 … 199; it is at the edges in 1 of 5 accesses.
    assert 39 <= means.min() < 60
    assert 180 < means.max() <= 200
    assert AiposFood(tmp_path, size=32)[0][0].float().mean() == pytest.approx(119.5, abs=1)
