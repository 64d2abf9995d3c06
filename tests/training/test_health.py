import math
import random

import pytest
import torch

from easy_diffusion.training.health import WINDOW, TrainingHealth
from easy_diffusion.training.memory import catch_out_of_memory, find_largest_batch, free_memory


def modules(value=0.0):
    module = torch.nn.ModuleDict({"network": torch.nn.Linear(1, 1)})
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(value)
    return module


def test_what_is_not_finite_and_what_is_a_spike_is_wrong():
    health, noise = TrainingHealth(modules()), random.Random(0)
    losses = [0.1 * 2 ** noise.gauss(0, 1) for _ in range(5000)]            # as uneven as the losses of small batches are
    assert [health.check(loss, 1.0, losses[:i]) for i, loss in enumerate(losses)] == [""] * 5000
    for value in (math.nan, math.inf, -math.inf):
        assert health.check(value, 1.0, losses) and health.check(0.1, value, losses)
    mean = sum(losses[-WINDOW:]) / WINDOW
    assert health.check(100 * mean, 1.0, losses).startswith("the loss is ")
    assert health.check(100 * mean, 1.0, losses[:WINDOW - 1]) == "", "too few losses to tell a spike from"
    assert TrainingHealth(modules(), spike=math.inf).check(100 * mean, 1.0, losses) == ""
    assert health.check(2.9, 1.0, [1.0] * WINDOW) == "" and health.check(3.1, 1.0, [1.0] * WINDOW)


def test_several_in_a_row_bring_the_average_back_and_halve_the_rate_until_it_has_been_tried_often_enough():
    average, weights = modules(1.0), modules(1.0)
    health, optimizer = TrainingHealth(average, patience=3, max_rollbacks=2), torch.optim.AdamW(weights.parameters(), fused=True)
    weights["network"](torch.ones(1, 1)).sum().backward()
    optimizer.step()
    for index in range(WINDOW + 1):
        health.step_taken(index, modules(float(index)), [0.5] * (index + 1))       # the copy is of step 100
    for rescue in range(2):
        assert [health.step_skipped("nan", WINDOW + 1 + 3 * rescue + i) for i in range(3)] == [False, False, True]
        assert "average of step 100" in health.roll_back(weights, average, [optimizer])
        assert {float(p) for module in (weights, average) for p in module.parameters()} == {100.0} and not optimizer.state
        assert health.lr_scale == 0.5 ** (rescue + 1)
    assert [health.step_skipped(f"nan {i}", 200) for i in range(3)] == [False, False, True] and health.roll_back(weights, average, []) == ""
    assert health.skipped == 9 and "nan 0; 9 steps were skipped" in health.describe()


def test_no_copy_is_taken_of_a_run_that_is_getting_worse():
    health, losses = TrainingHealth(modules()), []
    for index in range(10 * WINDOW):
        losses.append(0.1 if index < 500 else 0.1 * 1.01 ** (index - 500))  # doubles in 70 steps
        health.step_taken(index, modules(), losses)
    assert 400 <= health.snapshot_step <= 600
    for index in range(1, 350):                                             # nor within a hundred steps of a bad one
        health = TrainingHealth(modules()) if index == 1 else health
        health.step_skipped("nan", index) if index == 150 else health.step_taken(index, modules(), [0.1] * index)
        assert index < 151 or index >= 250 or health.snapshot_step == 100
    assert health.snapshot_step == 250


def test_its_state_goes_on():
    health = TrainingHealth(modules(3.0))
    health.step_skipped("nan", 7)
    other = TrainingHealth(modules())
    other.load_state_dict(health.state_dict())
    assert {k: v for k, v in vars(other).items() if k != "copy"} == {k: v for k, v in vars(health).items() if k != "copy"}
    assert float(other.snapshot["network.weight"]) == 3.0


def test_only_a_lack_of_memory_is_caught_and_what_it_held_is_given_back():
    def greedy(error):
        big.append(torch.zeros(10))
        raise error
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        big = []
        assert catch_out_of_memory(greedy, error) is None and big
    for error in (RuntimeError("shapes differ"), NotImplementedError("no kernel"), RecursionError(), ValueError("out of memory")):
        with pytest.raises(type(error)):
            catch_out_of_memory(greedy, error)
    assert catch_out_of_memory(lambda a: a + 1, 2) == 3
    with pytest.raises(RuntimeError, match="can't allocate memory"):        # what torch really says
        torch.zeros(2 ** 50)
    assert catch_out_of_memory(torch.zeros, 2 ** 50) is None


def test_the_largest_batch_is_found_by_doubling():
    tried, asked = [], []

    def step(pictures):
        tried.append(pictures)
        if pictures > 100:
            raise torch.OutOfMemoryError
    assert find_largest_batch(step) == 64 and tried == [1, 2, 4, 8, 16, 32, 64, 128]
    assert find_largest_batch(lambda pictures: None, max_batch=16) == 16
    with pytest.raises(MemoryError, match="not enough memory for a step with one"):
        find_largest_batch(lambda pictures: step(1000))
    assert find_largest_batch(lambda pictures: None, all_agree=lambda fits: fits and len(asked.append(fits) or asked) < 7) == 4
    assert asked == [True] * 7                                              # twice a size: is there room, and was there


def test_free_memory_is_some_of_the_computers():
    assert 0 < free_memory() < 2 ** 50
