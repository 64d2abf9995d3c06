import random

import pytest
import torch

from easy_diffusion.training.optimizers import (
    OptimizerPhases,
    build_optimizers,
    has_plateaued,
)
from easy_diffusion.training.options import OptimizerOptions, PlateauOptions


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


def test_the_weight_decay_is_that_of_both_optimizers():
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    pairs = build_optimizers(parameters, 1e-3, muon_learning_rate=2e-3, weight_decay=0.3)
    groups = [group for optimizer, _ in pairs for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]
    for parameter in parameters:            # without a gradient only the decay changes a weight
        parameter.grad = torch.zeros_like(parameter)
    for optimizer, _ in pairs:
        optimizer.step()
    assert parameters[0].detach().unique().item() == pytest.approx(1 - 2e-3 * 0.3, abs=1e-7)
    assert parameters[1].detach().unique().item() == pytest.approx(1 - 1e-3 * 0.3, abs=1e-7)


def test_warm_up_and_decay_are_of_adamw_and_muon_and_a_roll_back_is_of_sgd_too():
    phases = OptimizerPhases(
        list(torch.nn.Linear(3, 2).parameters()),
        OptimizerOptions(learning_rate=1e-3, muon_learning_rate=2e-3),
        PlateauOptions(sgd_learning_rate=1e-6),
    )
    phases.set_learning_rates(lr_multiplier=0.25, lr_scale=0.5)
    assert [optimizer.param_groups[0]["lr"] for optimizer, _ in phases.adamw] == [
        0.125e-3, 0.25e-3,
    ]
    (sgd, _), = phases.sgd
    assert sgd.param_groups[0]["lr"] == 0.5e-6


def test_a_network_of_matrices_alone_is_trained_by_muon_alone():
    matrix = torch.nn.Parameter(torch.ones(2, 3))
    (optimizer, peak), = build_optimizers([matrix], 1e-3, muon_learning_rate=2e-3)
    assert type(optimizer).__name__ == "Muon" and peak == 2e-3
    with pytest.raises(ValueError, match="empty parameter list"):
        build_optimizers([], 1e-3, muon_learning_rate=2e-3)
