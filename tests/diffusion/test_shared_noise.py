"""Shared noise: each frame's is standard normal, and two frames correlate by the fraction."""

import pytest
import torch

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.diffusion.shared_noise import SharedNoiseDiffusion

SCHEDULE = NoiseSchedule.cosine(100)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_mean_variance_and_correlation(fraction):
    """Within five standard errors, of 49,152 values."""
    diffusion = SharedNoiseDiffusion(fraction, SCHEDULE)
    shape = (4, 3, 3, 64, 64)
    noise = diffusion.draw_noise(shape, torch.Generator().manual_seed(0))
    frames = noise.transpose(1, 2).flatten(2)                       # [B, F, C·H·W]
    a, b, c = frames.transpose(0, 1).flatten(1)                     # [B·C·H·W] each
    error = 5 / len(a) ** 0.5
    for frame in (a, b, c):
        assert abs(frame.mean()) < error and abs(frame.square().mean() - 1) < 1.5 * error
    for one, other in ((a, b), (b, c), (a, c)):
        assert abs((one * other).mean() - fraction) < 1.5 * error


def test_fraction_0_is_gaussian_diffusion():
    noises = [
        diffusion.draw_noise((2, 3, 4, 8, 8), torch.Generator().manual_seed(3))
        for diffusion in (SharedNoiseDiffusion(0.0, SCHEDULE), GaussianDiffusion(SCHEDULE))
    ]
    assert torch.equal(*noises)


def test_the_loss_is_that_of_its_noise():
    """With a network that always gives zero the loss of eps is the mean square of the noise."""
    diffusion = SharedNoiseDiffusion(0.5, SCHEDULE, prediction_type="eps")
    x0, t = torch.zeros(2, 3, 4, 8, 8), torch.tensor([3, 90])
    loss = diffusion.loss(
        lambda x, *_: torch.zeros_like(x), x0, t, generator=torch.Generator().manual_seed(1)
    )
    noise = diffusion.draw_noise(x0.shape, torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss, noise.square().flatten(1).mean(dim=1))


def test_a_film_depends_on_its_own_generator_alone():
    diffusion = SharedNoiseDiffusion(0.5, SCHEDULE)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = diffusion.draw_noise((2, 3, 4, 8, 8), generators)
    alone = diffusion.draw_noise((1, 3, 4, 8, 8), [torch.Generator().manual_seed(6)])
    assert torch.equal(both[1:], alone)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="1.5"):
        SharedNoiseDiffusion(1.5, SCHEDULE)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        SharedNoiseDiffusion(0.5, SCHEDULE).draw_noise((2, 3, 8, 8))
