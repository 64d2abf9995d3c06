"""What a run tells while it works: a function from steps to steps, to be put around any training that yields them.

    for step in watched(train(...), csv="out/run.csv", log_every=10): ...

A bar shows the loss, pictures a second and the time that is left; sentences of the run stand above it. The CSV has a row every `every`
steps, whose columns are the steps' numbers and whatever `look`, called now and then, returns; pandas reads it, and beside it lies a PNG of
its curves. A run that was killed and goes on takes out the rows after its checkpoint, and half rows, before it writes on: each step stands
there once. With `tensorboard` the same numbers go to TensorBoard, too. The file needs tqdm and matplotlib and, for TensorBoard, torch and
tensorboard.

>>> import tempfile, os
>>> from collections import namedtuple
>>> Step = namedtuple("Step", "index loss smooth_loss seconds progress images_per_second note")
>>> steps = (Step(i, 1 / (i + 1), 1 / (i + 1), float(i), (i + 1) / 4, 8.0, "") for i in range(4))
>>> path = os.path.join(tempfile.mkdtemp(), "run.csv")
>>> for step in watched(steps, csv=path, log_every=2, show_progress=False): pass
>>> print(open(path).read().splitlines()[0])
index,loss,smooth_loss,seconds,progress,images_per_second,note
>>> [row["index"] for row in rows(path)]
['0', '2', '3']
"""

import contextlib
import csv as table
import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from matplotlib.figure import Figure
from tqdm.auto import tqdm

OLD_COLUMNS = {"pictures_per_second": "images_per_second", "fidelity": "prompt_accuracy"}              # of an earlier version
CURVES = {"loss": {"smooth_loss": "all", "quartile_1": "least noise", "quartile_2": "less noise", "quartile_3": "more noise",
                   "quartile_4": "most noise"},
          "learning rate": {"learning_rate": ""}, "prompt accuracy": {"prompt_accuracy": ""}}


def scalar_fields(step) -> dict:
    """A step's fields that are numbers or text, by name; those that are tuples of numbers as name_1, name_2, …"""
    row = {}
    for name, value in step._asdict().items():
        if isinstance(value, (int, float, str)):
            row[name] = value
        elif isinstance(value, tuple):
            row |= {f"{name.removesuffix('s')}_{i}": part for i, part in enumerate(value, 1)}
        elif isinstance(value, dict):
            row |= value
    return row


def read_rows(path) -> list[dict]:
    """The whole rows of a CSV, as text; none where there is no file. A killed run may have left half a row at its end."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text("utf-8")
    rows = table.DictReader(io.StringIO(text[:text.rfind("\n") + 1]))
    return [{OLD_COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]


class CsvLog:
    """A CSV that a run writes and a later one goes on with, from step `first` on. columns: what there may be beside a step's own."""

    def __init__(self, path, step: dict, columns: Iterable[str] = ()):
        kept = [row for row in read_rows(path) if int(row["index"]) < step["index"]]
        self.columns = list(dict.fromkeys([*(kept[0] if kept else ()), *step, *columns]))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        beside = Path(f"{path}.writing")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = table.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)
        beside.replace(path)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = table.DictWriter(self.file, self.columns, extrasaction="ignore")

    def write(self, row: dict) -> None:
        self.writer.writerow(row)
        self.file.flush()


def plot_curves(path) -> Figure:
    """A CSV's numbers over the steps, as far as it has them: the smoothed loss, all of it and that of each quarter of the schedule, the
    learning rate, the fidelity. Where one phase followed upon another there is a line."""
    table = read_rows(path)
    names = [name for name in CURVES if any(row.get(column) for row in table for column in CURVES[name])]
    figure = Figure(figsize=(8, 1 + 2.5 * len(names)), layout="tight")
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0] if names else (), names):
        for column, label in CURVES[name].items():
            points = [(int(row["index"]), float(row[column])) for row in table if row.get(column)]
            if points:
                axes.plot(*zip(*points), "." if len(points) == 1 else "-", label=label)
        for before, row in zip(table, table[1:]):
            if before.get("phase") != row.get("phase"):
                axes.axvline(int(row["index"]), color="grey", linestyle=":", label=row["phase"])
        axes.set(xlabel="step", ylabel=name, yscale="linear" if name == "prompt accuracy" else "log")
        if name == "loss":
            axes.legend(fontsize=8, framealpha=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def save_curves(path) -> None:
    """The curves of path.csv, written as path.png beside it and renamed."""
    beside = Path(path).with_suffix(".png.writing")
    plot_curves(path).savefig(beside, format="png", dpi=100)
    beside.replace(Path(path).with_suffix(".png"))


def tensorboard_writer(folder):
    """TensorBoard's writer into a folder. Raises ModuleNotFoundError, saying what to install, where the library is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(f"TensorBoard is not installed: `pip install tensorboard`, or leave it out; the CSV has the same numbers "
                                  f"({error})") from error
    return SummaryWriter(str(folder))


@contextlib.contextmanager
def close_all() -> Iterator[list]:
    """A list of what is to be closed at the end, however that comes. Where the disk is still full then, a sentence says so."""
    opened = []
    try:
        yield opened
    finally:
        for each in opened:
            try:
                each.close()                                                # which writes once more what could not be written before
            except OSError as error:
                tqdm.write(f"the end of the log could not be written: {error}")


def track_progress(steps: Iterable, csv=None, tensorboard=None, log_every: int = 10, evaluate: Callable | None = None, sample_minutes: float = 2.0,
            extra_columns: Iterable[str] = (), show_progress: bool = True, description: str = "training") -> Iterator:
    """The same steps, with a bar, a CSV and TensorBoard beside them. steps: NamedTuples with index, loss or smooth_loss, seconds, progress
    and images_per_second, such as train's and train_autoencoder's.

    csv, tensorboard: a file and a folder, None for none. look: step → {name: number}, called every sample_minutes minutes of training and at
    the end, to draw samples or to measure; looks: the names that it may return. As often the CSV's curves are drawn. Where the disk is full
    a sentence says so, and the training goes on without what could not be written.
    """
    board, log, looked, told, steps = tensorboard_writer(tensorboard) if tensorboard else None, None, None, set(), iter(steps)
    shape = "{percentage:3.0f}%|{bar}| {desc}"
    with close_all() as opened, tqdm(total=100, desc=description, bar_format=shape, disable=not show_progress) as line:
        opened += [board] if board is not None else []
        while True:
            with warnings.catch_warnings(record=True) as warned:
                step = next(steps, None)
            sentences = [str(warning.message) for warning in warned] + [getattr(step, "note", "")]
            for sentence in dict.fromkeys(sentences):                       # above the bar, and each once
                if sentence and sentence not in told:
                    line.write(sentence)
                told.add(sentence)
            if step is None:
                break
            row, last = scalar_fields(step), step.progress >= 1
            looked = step.seconds if looked is None else looked
            left, loss = step.seconds * (1 / max(step.progress, 1e-9) - 1), row.get("smooth_loss", row["loss"])
            line.set_description_str(f"{description}, step {step.index}, loss {loss:.4f}, {step.images_per_second:.0f} pictures/s, "
                                     f"{left / 60:.1f} min left", refresh=False)
            line.update(100 * step.progress - line.n)
            try:
                due = last or step.seconds > looked + 60 * sample_minutes
                if due:
                    looked = step.seconds
                    row |= evaluate(step) if evaluate is not None else {}
                if step.index % log_every == 0 or last or row.get("note") or (due and evaluate is not None):
                    if csv is not None:
                        if log is None:
                            log = CsvLog(csv, row, extra_columns)
                            opened.append(log.file)
                        log.write(row)
                    for name, value in row.items() if board is not None else ():
                        if isinstance(value, (int, float)):
                            board.add_scalar(name, value, step.index)
                if due and log is not None:
                    save_curves(csv)
            except OSError as error:
                line.write(f"step {step.index} could not be written down, and the training goes on: {error}")
            yield step


class TrainingClock:
    """How far a run is, in steps and in seconds. What the caller does between two steps is no training time; what was before a break is."""

    def __init__(self, steps: int, minutes: float | None = None, save_seconds: float = 30):
        """Raises ValueError for no steps and no time."""
        if steps < 1 or (minutes is not None and minutes <= 0):
            raise ValueError(f"a training takes at least a step and some time, not steps={steps}, minutes={minutes}")
        self.steps, self.minutes, self.save_seconds = steps, minutes, save_seconds
        self.start()

    def start(self, index: int = 0, seconds: float = 0.0) -> None:
        """It begins now; index, seconds: of a run that goes on."""
        self.index, self.seconds, self.before, self.saved_at = index, seconds, seconds, seconds
        self.seen, self.started = 0, time.perf_counter()

    @property
    def progress(self) -> float:
        """From 0 to 1, of the steps or of the minutes, whichever is further."""
        return min(max(self.index / self.steps, self.seconds / (60 * self.minutes) if self.minutes else 0.0), 1.0)

    @property
    def images_per_second(self) -> float:
        return self.seen / max(self.seconds - self.before, 1e-9)

    def lr_multiplier(self, warmup: int, decay: float) -> float:
        """By how much a rate is below its peak. decay: the share of the run over which it falls to zero."""
        return min(1, (self.index + 1) / max(warmup, 1)) * min(1, (1 - self.progress) / max(decay, 1e-9))

    def now(self) -> float:
        """Seconds of training so far."""
        return self.before + time.perf_counter() - self.started

    def tick(self, images: int, seconds: float | None = None) -> None:
        """A step is done. seconds: what it is by the common clock of several processes, else by this one's."""
        self.index, self.seen, self.seconds = self.index + 1, self.seen + images, self.now() if seconds is None else seconds

    def is_save_due(self) -> bool:
        """Whether save_seconds have passed since this last was so."""
        due = self.seconds - self.saved_at > self.save_seconds
        self.saved_at = self.seconds if due else self.saved_at
        return due

    @contextlib.contextmanager
    def paused(self):
        """What is done inside takes no time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused
