import numpy as np
import pytest
import torch

from datasets.dishes import Dishes
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.inpainting.latent_repaint import latent_mask, make_latent_inpainter
from easy_diffusion.latent_space import decode_to_uint8
from easy_diffusion.networks.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder((32, 32), blocks=1, patch=2, scale=1.7, shift=0.2).eval()


def test_a_latent_is_inpainted_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[0, 0, 3, 4] = True
    mask[0, 0, 8:, :] = True
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[0, 0, 0, 1] = True
    expected[0, 0, 2:] = True
    assert torch.equal(latent_mask(mask, 4), expected)


def test_inpainting_in_latent_space_changes_no_pixel_outside_the_mask(autoencoder):
    shapes = []

    def denoise(x_t, t):
        shapes.append(x_t.shape)
        return Prediction(torch.zeros_like(x_t), x_t)

    image = Dishes(1, 32)[0][0].permute(1, 2, 0).numpy()
    mask = np.zeros((32, 32), bool)
    mask[:, 20:] = True
    torch.manual_seed(0)
    schedule = NoiseSchedule.cosine(100)
    inpaint = make_latent_inpainter(denoise, schedule, autoencoder, steps=4, resamples=1)
    inpainted = inpaint(image, mask)
    assert shapes[0] == (1, 4, 8, 8)
    assert np.array_equal(inpainted[:, :20], image[:, :20])

    # Far from the seam the result is near the denoiser's constant prediction, z = 0.
    zero_decoded = decode_to_uint8(autoencoder, torch.zeros(1, 4, 8, 8))[0]
    inpainted, image, zero_decoded = (
        x[:, 28:].astype(int) for x in (inpainted, image, zero_decoded)
    )
    assert np.abs(inpainted - zero_decoded).mean() < np.abs(image - zero_decoded).mean()


def test_what_lies_under_the_mask_has_no_effect_and_the_generator_has(autoencoder):
    def denoise(x_t, t):
        return Prediction(x_t / 2, x_t / 2)

    def inpaint(image, seed):
        generator = torch.Generator().manual_seed(seed)
        schedule = NoiseSchedule.cosine(100)
        inpainter = make_latent_inpainter(
            denoise, schedule, autoencoder, steps=4, resamples=1, generator=generator
        )
        return inpainter(image, mask)

    image = Dishes(1, 32)[0][0].permute(1, 2, 0).numpy()
    mask = np.zeros((32, 32), bool)
    mask[:, 20:] = True
    other = image.copy()
    other[mask] = 255 - other[mask]
    assert np.array_equal(inpaint(other, 0), inpaint(image, 0))
    assert not np.array_equal(inpaint(image, 1), inpaint(image, 0))
