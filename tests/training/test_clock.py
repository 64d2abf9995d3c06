import pytest

from easy_diffusion.training.clock import TrainingClock


def learning_rates(clock, steps, warmup, decay=0.4):
    """The multipliers of the first steps."""
    multipliers = []
    for _ in range(steps):
        multipliers.append(clock.lr_multiplier(warmup, decay))
        clock.tick(images=1)
    return multipliers


def test_a_long_run_warms_up_for_the_given_steps_and_decays_at_the_end():
    multipliers = learning_rates(TrainingClock(1000), 1000, warmup=10, decay=0.5)
    assert multipliers[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(multipliers[10:500]) == {1.0}
    assert multipliers[750] == pytest.approx(0.5)
    assert multipliers[999] == pytest.approx(0.002)


@pytest.mark.parametrize("steps", [1, 5, 30, 300])
def test_a_short_run_reaches_the_peak_after_a_tenth_of_its_steps(steps):
    multipliers = learning_rates(TrainingClock(steps), steps, warmup=100)
    assert max(multipliers) == 1.0
    assert multipliers.index(1.0) <= steps / 10


def test_a_run_limited_by_minutes_warms_up_during_a_tenth_of_them_but_not_in_fewer_than_10_steps():
    clock = TrainingClock(None, minutes=1)
    multipliers = []
    for index in range(30):                     # one step a second
        multipliers.append(clock.lr_multiplier(100, 0.4))
        clock.tick(images=1, seconds=float(index + 1))
    # Step i begins after i of the 6 seconds, and i + 1 of the 10 steps.
    expected = [max((i + 1) / 100, min(i / 6, (i + 1) / 10)) for i in range(10)]
    assert multipliers[:10] == pytest.approx(expected)
    assert multipliers[9] == 1.0

    slow_first_step = TrainingClock(None, minutes=1)
    slow_first_step.tick(images=1, seconds=12.0)
    assert slow_first_step.lr_multiplier(100, 0.4) == pytest.approx(0.2)


def test_without_limits_progress_stays_0_and_the_learning_rate_does_not_fall():
    multipliers = learning_rates(clock := TrainingClock(None), 1000, warmup=10)
    assert clock.progress == 0
    assert set(multipliers[9:]) == {1.0}


def test_a_resumed_run_counts_speed_and_time_since_the_last_checkpoint_anew():
    clock = TrainingClock(1000, save_seconds=30)
    clock.start(index=100, seconds=500.0)
    clock.tick(images=8, seconds=502.0)
    assert clock.images_per_second == pytest.approx(4.0)
    assert clock.index == 101
    due = []
    for seconds in (529.0, 531.0, 532.0, 561.0, 562.0):
        clock.tick(images=8, seconds=seconds)
        due.append(clock.is_save_due())
    assert due == [False, True, False, False, True]


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(steps=None, minutes=0)])
def test_no_steps_and_no_minutes_are_refused(wrong):
    with pytest.raises(ValueError, match="at least one step and more than 0 minutes"):
        TrainingClock(**wrong)
