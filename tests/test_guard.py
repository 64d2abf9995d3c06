import math
import random

import pytest
import torch

from easy_diffusion.guard import WINDOW, Guard, free_memory, largest_batch, unless_out_of_memory


def modules(value=0.0):
    module = torch.nn.ModuleDict({"network": torch.nn.Linear(1, 1)})
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(value)
    return module


def test_what_is_not_finite_and_what_is_a_spike_is_wrong():
    guard, noise = Guard(modules()), random.Random(0)
    losses = [0.1 * 2 ** noise.gauss(0, 1) for _ in range(5000)]            # as uneven as the losses of small batches are
    assert [guard.wrong_with(loss, 1.0, losses[:i]) for i, loss in enumerate(losses)] == [""] * 5000
    for value in (math.nan, math.inf, -math.inf):
        assert guard.wrong_with(value, 1.0, losses) and guard.wrong_with(0.1, value, losses)
    mean = sum(losses[-WINDOW:]) / WINDOW
    assert guard.wrong_with(100 * mean, 1.0, losses).startswith("the loss is ")
    assert guard.wrong_with(100 * mean, 1.0, losses[:WINDOW - 1]) == "", "too few losses to tell a spike from"
    assert Guard(modules(), spike=math.inf).wrong_with(100 * mean, 1.0, losses) == ""
    assert guard.wrong_with(2.9, 1.0, [1.0] * WINDOW) == "" and guard.wrong_with(3.1, 1.0, [1.0] * WINDOW)


def test_several_in_a_row_bring_the_average_back_and_halve_the_rate_until_it_has_been_tried_often_enough():
    average, weights = modules(1.0), modules(1.0)
    guard, optimizer = Guard(average, patience=3, rescues=2), torch.optim.AdamW(weights.parameters(), fused=True)
    weights["network"](torch.ones(1, 1)).sum().backward()
    optimizer.step()
    for index in range(WINDOW + 1):
        guard.took(index, modules(float(index)), [0.5] * (index + 1))       # the copy is of step 100
    for rescue in range(2):
        assert [guard.skips("nan", WINDOW + 1 + 3 * rescue + i) for i in range(3)] == [False, False, True]
        assert "average of step 100" in guard.rescue(weights, average, [optimizer])
        assert {float(p) for module in (weights, average) for p in module.parameters()} == {100.0} and not optimizer.state
        assert guard.lower == 0.5 ** (rescue + 1)
    assert [guard.skips(f"nan {i}", 200) for i in range(3)] == [False, False, True] and guard.rescue(weights, average, []) == ""
    assert guard.skipped == 9 and "nan 0; 9 steps were skipped" in guard.verdict()


def test_no_copy_is_taken_of_a_run_that_is_getting_worse():
    guard, losses = Guard(modules()), []
    for index in range(10 * WINDOW):
        losses.append(0.1 if index < 500 else 0.1 * 1.01 ** (index - 500))  # doubles in 70 steps
        guard.took(index, modules(), losses)
    assert 400 <= guard.copied_at <= 600
    for index in range(1, 350):                                             # nor within a hundred steps of a bad one
        guard = Guard(modules()) if index == 1 else guard
        guard.skips("nan", index) if index == 150 else guard.took(index, modules(), [0.1] * index)
        assert index < 151 or index >= 250 or guard.copied_at == 100
    assert guard.copied_at == 250


def test_its_state_goes_on():
    guard = Guard(modules(3.0))
    guard.skips("nan", 7)
    other = Guard(modules())
    other.load_state_dict(guard.state_dict())
    assert {k: v for k, v in vars(other).items() if k != "copy"} == {k: v for k, v in vars(guard).items() if k != "copy"}
    assert float(other.copy["network.weight"]) == 3.0


def test_only_a_lack_of_memory_is_caught_and_what_it_held_is_given_back():
    def greedy(error):
        big.append(torch.zeros(10))
        raise error
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        big = []
        assert unless_out_of_memory(greedy, error) is None and big
    for error in (RuntimeError("shapes differ"), NotImplementedError("no kernel"), RecursionError(), ValueError("out of memory")):
        with pytest.raises(type(error)):
            unless_out_of_memory(greedy, error)
    assert unless_out_of_memory(lambda a: a + 1, 2) == 3
    with pytest.raises(RuntimeError, match="can't allocate memory"):        # what torch really says
        torch.zeros(2 ** 50)
    assert unless_out_of_memory(torch.zeros, 2 ** 50) is None


def test_the_largest_batch_is_found_by_doubling():
    tried, asked = [], []

    def step(pictures):
        tried.append(pictures)
        if pictures > 100:
            raise torch.OutOfMemoryError
    assert largest_batch(step) == 64 and tried == [1, 2, 4, 8, 16, 32, 64, 128]
    assert largest_batch(lambda pictures: None, most=16) == 16
    with pytest.raises(MemoryError, match="not enough memory for a step with one"):
        largest_batch(lambda pictures: step(1000))
    assert largest_batch(lambda pictures: None, agreed=lambda fits: fits and len(asked.append(fits) or asked) < 7) == 4
    assert asked == [True] * 7                                              # twice a size: is there room, and was there


def test_free_memory_is_some_of_the_computers():
    assert 0 < free_memory() < 2 ** 50
