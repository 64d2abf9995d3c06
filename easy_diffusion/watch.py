"""What a run tells while it works: a function from steps to steps, to be put around any training that yields them.

    for step in watched(train(...), csv="out/run.csv", every=10): ...

A bar shows the loss, pictures a second and the time that is left; sentences of the run stand above it. The CSV has a row every `every`
steps, whose columns are the steps' numbers and whatever `look`, called now and then, returns; pandas reads it, and beside it lies a PNG of
its curves. A run that was killed and goes on takes out the rows after its checkpoint, and half rows, before it writes on: each step stands
there once. With `tensorboard` the same numbers go to TensorBoard, too. The file needs tqdm and matplotlib and, for TensorBoard, torch and
tensorboard.

>>> import tempfile, os
>>> from collections import namedtuple
>>> Step = namedtuple("Step", "index loss smooth_loss seconds progress pictures_per_second note")
>>> steps = (Step(i, 1 / (i + 1), 1 / (i + 1), float(i), (i + 1) / 4, 8.0, "") for i in range(4))
>>> path = os.path.join(tempfile.mkdtemp(), "run.csv")
>>> for step in watched(steps, csv=path, every=2, bar=False): pass
>>> print(open(path).read().splitlines()[0])
index,loss,smooth_loss,seconds,progress,pictures_per_second,note
>>> [row["index"] for row in rows(path)]
['0', '2', '3']
"""

import contextlib
import csv as table
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from matplotlib.figure import Figure
from tqdm.auto import tqdm

CURVES = {"loss": {"smooth_loss": "all", "quartile_1": "least noise", "quartile_2": "less noise", "quartile_3": "more noise",
                   "quartile_4": "most noise"},
          "learning rate": {"learning_rate": ""}, "fidelity": {"fidelity": ""}}


def numbers_of(step) -> dict:
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


def rows(path) -> list[dict]:
    """The whole rows of a CSV, as text; none where there is no file. A killed run may have left half a row at its end."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text("utf-8")
    return list(table.DictReader(io.StringIO(text[:text.rfind("\n") + 1])))


class Table:
    """A CSV that a run writes and a later one goes on with, from step `first` on. columns: what there may be beside a step's own."""

    def __init__(self, path, step: dict, columns: Iterable[str] = ()):
        kept = [row for row in rows(path) if int(row["index"]) < step["index"]]
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


def curves(path) -> Figure:
    """A CSV's numbers over the steps, as far as it has them: the smoothed loss, all of it and that of each quarter of the schedule, the
    learning rate, the fidelity. Where one phase followed upon another there is a line."""
    table = rows(path)
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
        axes.set(xlabel="step", ylabel=name, yscale="linear" if name == "fidelity" else "log")
        if name == "loss":
            axes.legend(fontsize=8, framealpha=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw(path) -> None:
    """The curves of path.csv, written as path.png beside it and renamed."""
    beside = Path(path).with_suffix(".png.writing")
    curves(path).savefig(beside, format="png", dpi=100)
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
def closed() -> Iterator[list]:
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


def watched(steps: Iterable, csv=None, tensorboard=None, every: int = 10, look: Callable | None = None, look_minutes: float = 2.0,
            looks: Iterable[str] = (), bar: bool = True, description: str = "training") -> Iterator:
    """The same steps, with a bar, a CSV and TensorBoard beside them. steps: NamedTuples with index, loss or smooth_loss, seconds, progress
    and pictures_per_second, such as train's and train_autoencoder's.

    csv, tensorboard: a file and a folder, None for none. look: step → {name: number}, called every look_minutes minutes of training and at
    the end, to draw samples or to measure; looks: the names that it may return. As often the CSV's curves are drawn. Where the disk is full
    a sentence says so, and the training goes on without what could not be written.
    """
    board, log, looked, told, steps = tensorboard_writer(tensorboard) if tensorboard else None, None, None, set(), iter(steps)
    shape = "{percentage:3.0f}%|{bar}| {desc}"
    with closed() as opened, tqdm(total=100, desc=description, bar_format=shape, disable=not bar) as line:
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
            row, last = numbers_of(step), step.progress >= 1
            looked = step.seconds if looked is None else looked
            left, loss = step.seconds * (1 / max(step.progress, 1e-9) - 1), row.get("smooth_loss", row["loss"])
            line.set_description_str(f"{description}, step {step.index}, loss {loss:.4f}, {step.pictures_per_second:.0f} pictures/s, "
                                     f"{left / 60:.1f} min left", refresh=False)
            line.update(100 * step.progress - line.n)
            try:
                due = last or step.seconds > looked + 60 * look_minutes
                if due:
                    looked = step.seconds
                    row |= look(step) if look is not None else {}
                if step.index % every == 0 or last or row.get("note") or (due and look is not None):
                    if csv is not None:
                        if log is None:
                            log = Table(csv, row, looks)
                            opened.append(log.file)
                        log.write(row)
                    for name, value in row.items() if board is not None else ():
                        if isinstance(value, (int, float)):
                            board.add_scalar(name, value, step.index)
                if due and log is not None:
                    draw(csv)
            except OSError as error:
                line.write(f"step {step.index} could not be written down, and the training goes on: {error}")
            yield step
