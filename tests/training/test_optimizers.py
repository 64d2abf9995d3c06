import random

from easy_diffusion.training.optimizers import has_plateaued


def test_has_plateaued_distinguishes_a_slope_from_a_plateau():
    def noisy_losses(slope, seed):
        rng = random.Random(seed)
        return [1 - slope * i + rng.gauss(0, 0.1) for i in range(800)]

    # The means of the windows differ by 400 · slope, with a standard error of
    # 0.1 sqrt(2 / 400) = 0.007.
    falling = [has_plateaued(noisy_losses(1e-4, seed), 400) for seed in range(50)]
    assert not any(falling)                 # a difference of 0.04: 5.7 standard errors
    constant = [has_plateaued(noisy_losses(0, seed), 400) for seed in range(50)]
    assert sum(constant) > 35               # P(z < 1) = 0.84: 42 of 50 are expected
    assert not has_plateaued(noisy_losses(0, 0), 401), "two complete windows are needed"
    assert not has_plateaued([0.5 - i / 100 for i in range(10)], 5)
    assert has_plateaued([0.4, 0.5] * 10, 10)
