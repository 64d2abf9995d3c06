import math
import random

import torch

from easy_diffusion.training.health import WINDOW, TrainingHealth


def make_models(value=0.0):
    """Modules whose parameters all have one value."""
    models = torch.nn.ModuleDict({"network": torch.nn.Linear(1, 1)})
    with torch.no_grad():
        for parameter in models.parameters():
            parameter.fill_(value)
    return models


def test_steps_that_are_not_finite_and_spikes_are_bad():
    health = TrainingHealth(make_models())
    rng = random.Random(0)
    # As uneven as the losses of small batches are.
    losses = [0.1 * 2 ** rng.gauss(0, 1) for _ in range(5000)]
    reasons = [health.check(loss, 1.0, losses[:i]) for i, loss in enumerate(losses)]
    assert reasons == [""] * 5000
    for value in (math.nan, math.inf, -math.inf):
        assert health.check(value, 1.0, losses)
        assert health.check(0.1, value, losses)
    mean = sum(losses[-WINDOW:]) / WINDOW
    assert health.check(100 * mean, 1.0, losses).startswith("the loss is ")
    assert health.check(100 * mean, 1.0, losses[:WINDOW - 1]) == "", "too few losses to compare"
    assert TrainingHealth(make_models(), spike=math.inf).check(100 * mean, 1.0, losses) == ""
    assert health.check(2.9, 1.0, [1.0] * WINDOW) == ""
    assert health.check(3.1, 1.0, [1.0] * WINDOW)


def test_several_bad_steps_roll_back_and_halve_the_learning_rate_up_to_max_rollbacks():
    models = make_models(1.0)
    ema_models = make_models(1.0)
    health = TrainingHealth(ema_models, patience=3, max_rollbacks=2)
    optimizer = torch.optim.AdamW(models.parameters(), fused=True)
    models["network"](torch.ones(1, 1)).sum().backward()
    optimizer.step()
    for index in range(WINDOW + 1):         # the snapshot is of step 100
        health.step_taken(index, make_models(float(index)), [0.5] * (index + 1))

    for rollback in range(2):
        first = WINDOW + 1 + 3 * rollback
        due = [health.step_skipped("nan", first + i) for i in range(3)]
        assert due == [False, False, True]
        assert "EMA weights of step 100" in health.roll_back(models, ema_models, [optimizer])
        values = {p.item() for module in (models, ema_models) for p in module.parameters()}
        assert values == {100.0}
        assert not optimizer.state
        assert health.lr_scale == 0.5 ** (rollback + 1)

    due = [health.step_skipped(f"nan {i}", 200) for i in range(3)]
    assert due == [False, False, True]
    assert health.roll_back(models, ema_models, []) == ""
    assert health.skipped == 9
    assert "nan 0; 9 steps were skipped" in health.describe()


def test_no_snapshot_is_taken_while_the_loss_rises():
    health = TrainingHealth(make_models())
    losses = []
    for index in range(10 * WINDOW):
        # Constant up to step 500; then it doubles every 70 steps.
        losses.append(0.1 if index < 500 else 0.1 * 1.01 ** (index - 500))
        health.step_taken(index, make_models(), losses)
    assert 400 <= health.snapshot_step <= 600


def test_no_snapshot_is_taken_within_100_steps_after_a_bad_step():
    health = TrainingHealth(make_models())
    for index in range(1, 350):
        if index == 150:
            health.step_skipped("nan", index)
        else:
            health.step_taken(index, make_models(), [0.1] * index)
        if 151 <= index < 250:
            assert health.snapshot_step == 100
    assert health.snapshot_step == 250


def test_its_state_can_be_saved_and_loaded():
    health = TrainingHealth(make_models(3.0))
    health.step_skipped("nan", 7)
    other = TrainingHealth(make_models())
    other.load_state_dict(health.state_dict())
    assert vars(other).keys() == vars(health).keys()
    for name, value in vars(health).items():
        if name != "snapshot":
            assert vars(other)[name] == value
    assert float(other.snapshot["network.weight"]) == 3.0


def test_roll_backs_are_forgotten_after_1000_good_steps():
    """Until then, more bad steps count as the same failure of the training."""
    health = TrainingHealth(make_models(), patience=1)
    health.step_skipped("nan", 50)
    health.roll_back(make_models(), make_models(), [])
    remaining = {}
    for index in (51, 50 + WINDOW, 50 + 10 * WINDOW - 1, 50 + 10 * WINDOW):
        health.step_taken(index, make_models(), [0.1] * WINDOW)
        remaining[index] = health.rollbacks
    assert remaining == {51: 1, 150: 1, 1049: 1, 1050: 0}
    assert health.lr_scale == 0.5
