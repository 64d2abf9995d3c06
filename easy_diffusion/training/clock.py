"""The clock of a training: its steps, its seconds, and the learning rate that follows from them.

The learning rate of step i = 0, 1, 2, … is a fraction of its peak. It rises during the first steps
(warm-up) and falls to zero at the end (decay):

    lr_multiplier = min(1, (i + 1) / w) · min(1, (1 - progress) / decay)
    w             = min(warmup, steps / 10)

progress is the finished fraction of the run, from 0 to 1. With at most a tenth of the run for the
warm-up, a short run reaches its peak, too. A run that is limited by minutes knows the number of
its steps only at the end. There the learning rate rises during a tenth of the minutes, if that ends
before `warmup` steps, but not within fewer than 10 steps: the first ones are slow. A run
without a limit has progress 0, so its learning rate does not fall.

The file needs nothing but Python.

>>> clock = TrainingClock(steps=40)
>>> clock.progress, clock.lr_multiplier(warmup=100, decay=0.4)
(0.0, 0.25)
>>> for _ in range(32):
...     clock.tick(images=8)
>>> clock.progress, round(clock.lr_multiplier(warmup=100, decay=0.4), 6)
(0.8, 0.5)
"""

import contextlib
import time
from collections.abc import Iterator

# The largest fraction of the run that warm-up takes, and the fewest steps if minutes limit it.
WARMUP_FRACTION = 0.1
WARMUP_STEPS = 10


class TrainingClock:
    """Counts the steps, images and seconds of a training.

    The seconds of a resumed training include those before the interruption. Time inside `paused`,
    such as the caller's work between two steps, does not count.

    steps: number of steps of the whole training, at least 1; None for no limit.
    minutes: limit of the training time, above 0; None for no limit.
    save_seconds: seconds of training between two checkpoints.

    The attributes `index`, the number of finished steps, and `seconds`, the training time at the
    end of the last one, are public. Raises ValueError for steps or minutes out of range.
    """

    def __init__(
        self, steps: int | None, minutes: float | None = None, save_seconds: float = 30
    ):
        if (steps is not None and steps < 1) or (minutes is not None and minutes <= 0):
            raise ValueError(
                "a training needs at least one step and more than 0 minutes, "
                f"not steps={steps}, minutes={minutes}"
            )
        self.steps = steps
        self.minutes = minutes
        self.save_seconds = save_seconds
        self.start()

    def start(self, index: int = 0, seconds: float = 0.0) -> None:
        """Start the clock; index, seconds: where a resumed training continues."""
        self.index = index
        self.seconds = seconds
        self._resumed_at = seconds
        self._saved_at = seconds
        self._images = 0                # since the start or the resumption
        self._started = time.perf_counter()

    # ---------------------------------------------------------------- progress, learning rate

    @property
    def fraction_of_time(self) -> float:
        """Fraction of the minutes that is over; 0 without a limit."""
        return self.seconds / (60 * self.minutes) if self.minutes else 0.0

    @property
    def progress(self) -> float:
        """Fraction of the steps or of the minutes that is over, whichever is larger, 0 to 1."""
        fraction_of_steps = self.index / self.steps if self.steps else 0.0
        return min(max(fraction_of_steps, self.fraction_of_time), 1.0)

    def lr_multiplier(self, warmup: int, decay: float) -> float:
        """Return the learning rate of the next step as a fraction of its peak, 0 to 1.

        warmup: number of steps over which the rate rises linearly to its peak, in a long run.
        decay: fraction of the training at its end over which the rate falls linearly to 0.
        """
        if self.steps is not None:
            warmup = min(warmup, WARMUP_FRACTION * self.steps)
        rising = (self.index + 1) / max(warmup, 1)
        of_time = self.fraction_of_time / WARMUP_FRACTION
        rising = max(rising, min(of_time, (self.index + 1) / WARMUP_STEPS))
        falling = (1 - self.progress) / max(decay, 1e-9)
        return min(1, rising) * min(1, falling)

    # ---------------------------------------------------------------- time

    @property
    def images_per_second(self) -> float:
        """Mean speed since the start, or since the training was resumed."""
        return self._images / max(self.seconds - self._resumed_at, 1e-9)

    def now(self) -> float:
        """Return the training time up to this moment, in seconds."""
        return self._resumed_at + time.perf_counter() - self._started

    def tick(self, images: int, seconds: float | None = None) -> None:
        """Count a finished step.

        images: number of images in the step's batch, over all processes.
        seconds: training time that all processes agreed on; None takes this process's own clock.
        """
        self.index += 1
        self._images += images
        self.seconds = self.now() if seconds is None else seconds

    def is_save_due(self) -> bool:
        """Return whether save_seconds have passed since the last call that returned True."""
        due = self.seconds - self._saved_at > self.save_seconds
        if due:
            self._saved_at = self.seconds
        return due

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the `with` block."""
        pause_started = time.perf_counter()
        yield
        self._started += time.perf_counter() - pause_started
