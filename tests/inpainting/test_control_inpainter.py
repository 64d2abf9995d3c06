"""The inpainter with a ControlNet behaves like the others, with a handful of evaluations."""

import numpy as np
import pytest
import torch

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.inpainting.control_inpainter import (
    CONTROL_CHANNELS,
    inpainting_control,
    make_control_inpainter,
)
from easy_diffusion.networks.controlnet import ControlNet
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet


@pytest.fixture
def networks():
    torch.manual_seed(0)
    encoder = CharacterEncoder("番茄汤", dim=8, layers=1)
    unet = UNet(channels=(64, 64), context_dim=8, attention=(False, True), patch=2)
    controlnet = ControlNet.from_unet(unet, CONTROL_CHANNELS)
    for module in (unet, controlnet):
        for parameter in module.parameters():
            if parameter.abs().max() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    return unet.eval(), controlnet.eval(), encoder.eval(), diffusion


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(256, size=(30, 42, 3), dtype=np.uint8)


def right_half(image):
    mask = np.zeros(image.shape[:2], bool)
    mask[:, 20:] = True
    return mask


def test_the_control_is_the_known_image_and_the_mask(image):
    mask = right_half(image)
    control = inpainting_control(image, mask)
    assert control.dtype == np.uint8 and control.shape == (4, 30, 42)
    assert np.array_equal(control[:3, ~mask], image.transpose(2, 0, 1)[:, ~mask])
    assert (control[:3, mask] == 127).all()
    assert np.array_equal(control[3], mask * np.uint8(255))


@pytest.mark.parametrize("guidance, calls", [(1.0, 6), (2.0, 12)])
def test_known_pixels_stay_and_the_number_of_evaluations_is_that_of_the_steps(
    networks, image, guidance, calls
):
    counted = []
    networks[0].register_forward_hook(lambda *_: counted.append(1))
    inpaint = make_control_inpainter(*networks, "番茄汤", guidance=guidance)
    mask = right_half(image)
    result = inpaint(image, mask)
    assert result.dtype == np.uint8 and result.shape == image.shape
    assert np.array_equal(result[~mask], image[~mask])
    assert not np.array_equal(result[mask], image[mask])
    assert len(counted) == calls


def test_it_sees_the_known_pixels_and_not_the_hidden_ones(networks, image):
    mask = right_half(image)

    def run(image):
        generator = torch.Generator().manual_seed(0)
        return make_control_inpainter(*networks, "", generator=generator)(image, mask)

    hidden_changed, known_changed = image.copy(), image.copy()
    hidden_changed[mask] = 0
    known_changed[:, :10] = 255 - known_changed[:, :10]
    assert np.array_equal(run(image), run(hidden_changed))
    assert not np.array_equal(run(image)[mask], run(known_changed)[mask])


def test_an_empty_mask_returns_a_copy_and_a_wrong_one_is_named(networks, image):
    inpaint = make_control_inpainter(*networks, "番茄汤")
    result = inpaint(image, np.zeros(image.shape[:2], bool))
    assert np.array_equal(result, image) and result is not image
    with pytest.raises(ValueError, match="the mask must be bool"):
        inpaint(image, np.zeros((5, 5), bool))
