import pytest
import torch

from easy_diffusion.diffusion.timesteps import uniform_timesteps
from easy_diffusion.training.data_loader import Batch
from easy_diffusion.training.draws import StepDraws

IMAGES = torch.zeros(6, 3, 4, 4)
CAPTIONS = list("红黑蓝绿黄白")


def draw(images, captions, rank=0, world_size=1, index=4):
    """Timesteps, captions and noise of one process in step `index`."""
    draws = StepDraws(uniform_timesteps, 1000, 0.5, 0, rank=rank, world_size=world_size)
    t, captions = draws.start_step(index, Batch(images, captions, {}))
    return t, captions, torch.randn(images.shape, generator=draws.noise_generator)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_draw_the_parts_of_what_one_draws(world_size):
    t, captions, noise = draw(IMAGES, CAPTIONS)
    size = 6 // world_size
    for rank in range(world_size):
        part = slice(rank * size, (rank + 1) * size)
        own_t, own_captions, own_noise = draw(IMAGES[part], CAPTIONS[part], rank, world_size)
        assert torch.equal(own_t, t[part])
        assert own_captions == captions[part]
        assert torch.equal(own_noise, noise[part])


def test_dropout_has_a_seed_of_its_own_in_each_step_and_process():
    values = []
    for rank in range(2):
        draws = StepDraws(uniform_timesteps, 1000, 0.5, 0, rank=rank, world_size=2)
        for index in range(2):
            with draws.dropout_rng(index):
                values.append(float(torch.rand(())))
    assert len(set(values)) == 4
