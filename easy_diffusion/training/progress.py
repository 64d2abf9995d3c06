"""Progress of a training: a progress bar, a CSV log, its curves, and TensorBoard.

`track_progress` wraps any generator of training steps and yields the same steps:

    for step in track_progress(train(...), csv="out/log.csv", log_every=10):
        ...

- The bar shows the loss, the images per second and the time left. Warnings and notes of the
  training appear above it.
- The CSV has a row every `log_every` steps. A row holds the step's scalar fields and the values
  that `evaluate` returns every few minutes. A PNG beside the CSV shows its curves.
- TensorBoard gets the same values as the CSV.

A resumed training continues its CSV. Rows of steps after the checkpoint and an incomplete last
row are removed first, so that no step is logged twice.

The file needs tqdm and matplotlib and, from this package, files.py. TensorBoard also needs torch
and tensorboard.

>>> import os, tempfile
>>> from collections import namedtuple
>>> Step = namedtuple("Step", "index loss smooth_loss seconds progress images_per_second note")
>>> steps = (Step(i, 1 / (i + 1), 1 / (i + 1), float(i), (i + 1) / 4, 8.0, "") for i in range(4))
>>> path = os.path.join(tempfile.mkdtemp(), "log.csv")
>>> for step in track_progress(steps, csv=path, log_every=2, show_progress=False):
...     pass
>>> print(open(path).read().splitlines()[0])
index,loss,smooth_loss,seconds,progress,images_per_second,note
>>> [row["index"] for row in read_rows(path)]
['0', '2', '3']
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from csv import DictReader, DictWriter
from pathlib import Path

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from ..files import atomic_path, write_atomically

# Column names of earlier versions → those of this version.
OLD_COLUMNS = {"pictures_per_second": "images_per_second", "fidelity": "prompt_accuracy"}

# What `plot_curves` draws: label of the vertical axis → {column: label of its curve}.
CURVES = {
    "loss": {
        "smooth_loss": "all",
        "quartile_1": "least noise",
        "quartile_2": "less noise",
        "quartile_3": "more noise",
        "quartile_4": "most noise",
    },
    "learning rate": {"learning_rate": ""},
    "prompt accuracy": {"prompt_accuracy": ""},
}


# ---------------------------------------------------------------- CSV log


def scalar_fields(step) -> dict:
    """Return the fields of a training step that a log can hold, as {column: value}.

    step: a NamedTuple. Numbers and strings keep their name. A tuple `quartiles` becomes the
        columns quartile_1, quartile_2, … The items of a dict become columns of their own. Other
        fields, such as networks, are left out.
    """
    row = {}
    for name, value in step._asdict().items():
        if isinstance(value, (int, float, str)):
            row[name] = value
        elif isinstance(value, tuple):
            singular = name.removesuffix("s")
            row |= {f"{singular}_{i}": element for i, element in enumerate(value, 1)}
        elif isinstance(value, dict):
            row |= value
    return row


def read_rows(path) -> list[dict]:
    """Read the complete rows of a CSV log as {column: text}; an empty list if there is no file.

    An incomplete last row, which a killed training may leave, is ignored.
    """
    if not Path(path).exists():
        return []
    text = Path(path).read_text("utf-8")
    complete_lines = text[:text.rfind("\n") + 1]
    return [
        {OLD_COLUMNS.get(name, name): value for name, value in row.items()}
        for row in DictReader(io.StringIO(complete_lines))
    ]


class CsvLog:
    """A CSV log that a resumed training continues.

    path: the file; its folder is created if it is missing. Rows in it of earlier steps are kept.
    first_row: {column: value} of the first step to log, with "index". It is not written by the
        constructor.
    extra_columns: columns that later rows may have and the first row may not.
    """

    def __init__(self, path, first_row: dict, extra_columns: Iterable[str] = ()):
        earlier_rows = [row for row in read_rows(path) if int(row["index"]) < first_row["index"]]
        earlier_columns = earlier_rows[0] if earlier_rows else ()
        self.columns = list(dict.fromkeys([*earlier_columns, *first_row, *extra_columns]))

        text = io.StringIO(newline="")
        writer = DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(earlier_rows)
        write_atomically(path, text.getvalue().encode("utf-8"))

        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = DictWriter(self.file, self.columns, extrasaction="ignore")

    def write(self, row: dict) -> None:
        """Append a row and flush the file; columns that the log does not have are left out."""
        self.writer.writerow(row)
        self.file.flush()


# ---------------------------------------------------------------- curves


def plot_curves(path) -> Figure:
    """Plot the columns of a CSV log over the steps, with one pair of axes for each entry of CURVES.

    An entry of which the log has no values gets no axes. A dotted vertical line marks each change
    of the column `phase`, such as the switch from AdamW to SGD.
    """
    rows = read_rows(path)
    titles = [
        title for title, labels in CURVES.items()
        if any(row.get(column) for row in rows for column in labels)
    ]
    figure = Figure(figsize=(8, 1 + 2.5 * len(titles)), layout="tight")
    if not titles:
        return figure
    all_axes = figure.subplots(len(titles), sharex=True, squeeze=False)[:, 0]

    for axes, title in zip(all_axes, titles):
        for column, label in CURVES[title].items():
            points = [(int(row["index"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                axes.plot(*zip(*points), "." if len(points) == 1 else "-", label=label)
        for previous, row in zip(rows, rows[1:]):
            if previous.get("phase") != row.get("phase"):
                axes.axvline(int(row["index"]), color="grey", linestyle=":", label=row["phase"])
        scale = "linear" if title == "prompt accuracy" else "log"
        axes.set(xlabel="step", ylabel=title, yscale=scale)
        if title == "loss":
            axes.legend(fontsize=8, framealpha=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def save_curves(path) -> None:
    """Save the curves of the CSV log `path` as a PNG file of the same name beside it."""
    with atomic_path(Path(path).with_suffix(".png")) as temporary:
        plot_curves(path).savefig(temporary, format="png", dpi=100)


# ---------------------------------------------------------------- progress bar and logging


def tensorboard_writer(folder):
    """Open a TensorBoard SummaryWriter that writes to `folder`.

    Raises ModuleNotFoundError if TensorBoard is missing, and names the command that installs it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard is not installed: run `pip install tensorboard`, or use the CSV log, "
            f"which has the same values ({error})"
        ) from error
    return SummaryWriter(str(folder))


@contextlib.contextmanager
def close_all() -> Iterator[list]:
    """Yield an empty list; close the objects in it at the end, also after an error.

    Closing a file writes what is still buffered. If the disk is full, a message says so.
    """
    opened = []
    try:
        yield opened
    finally:
        for file in opened:
            try:
                file.close()
            except OSError as error:
                tqdm.write(f"the end of the log could not be written: {error}")


def track_progress(
    steps: Iterable,
    csv=None,
    tensorboard=None,
    log_every: int = 10,
    evaluate: Callable | None = None,
    evaluate_minutes: float = 2.0,
    extra_columns: Iterable[str] = (),
    show_progress: bool = True,
    description: str = "training",
) -> Iterator:
    """Yield the same steps; show a progress bar and log to a CSV file and to TensorBoard.

    steps: NamedTuples with index, loss, seconds, progress (0 to 1) and images_per_second, such as
        those of `train` and `train_autoencoder`. smooth_loss and note are used if they exist.
    csv: path of the CSV log, or None for no log. A PNG file beside it shows its curves.
    tensorboard: folder for TensorBoard's files, or None for no TensorBoard.
    log_every: log the steps whose index is a multiple of this number. The last step and steps
        with a note or an evaluation are always logged.
    evaluate: step → {column: value}. Its values are logged; it may also write sample images.
    evaluate_minutes: minutes of training between two evaluations. There is one at the end, too.
        The curves are drawn at the same times, also without `evaluate`.
    extra_columns: names of the values that `evaluate` may return.
    show_progress: whether the bar is shown. Messages appear in any case.
    description: the text at the start of the bar.

    If a file cannot be written, for example on a full disk, a message says so and the training
    continues.
    """
    steps = iter(steps)
    board = tensorboard_writer(tensorboard) if tensorboard else None
    log = None
    last_evaluation = None              # in seconds of training
    shown_messages = set()
    bar_format = "{percentage:3.0f}%|{bar}| {desc}"
    with (
        close_all() as opened,
        tqdm(total=100, desc=description, bar_format=bar_format, disable=not show_progress) as bar,
    ):
        if board is not None:
            opened.append(board)
        while True:
            # Compute the next step and show its messages above the bar, each message once.
            step, messages = _next_step(steps)
            for message in messages:
                if message not in shown_messages:
                    bar.write(message)
                shown_messages.add(message)
            if step is None:
                break
            is_last = step.progress >= 1

            # Move the bar.
            bar.set_description_str(f"{description}, {_format_status(step)}", refresh=False)
            bar.update(100 * step.progress - bar.n)

            # Evaluate, log and draw the curves.
            if last_evaluation is None:
                last_evaluation = step.seconds
            evaluation_due = is_last or step.seconds > last_evaluation + 60 * evaluate_minutes
            row = scalar_fields(step)
            try:
                if evaluation_due:
                    last_evaluation = step.seconds
                    if evaluate is not None:
                        row |= evaluate(step)
                evaluated = evaluation_due and evaluate is not None
                if step.index % log_every == 0 or is_last or row.get("note") or evaluated:
                    if csv is not None and log is None:
                        log = CsvLog(csv, row, extra_columns)
                        opened.append(log.file)
                    if csv is not None:
                        log.write(row)
                    if board is not None:
                        _add_scalars(board, row, step.index)
                if evaluation_due and log is not None:
                    save_curves(csv)
            except OSError as error:
                bar.write(f"step {step.index} could not be logged; the training continues: {error}")
            yield step


def _next_step(steps: Iterator) -> tuple:
    """Return (next step, messages): its warnings and its note. At the end the step is None."""
    with warnings.catch_warnings(record=True) as caught:
        step = next(steps, None)
    messages = [str(warning.message) for warning in caught] + [getattr(step, "note", "")]
    return step, [message for message in messages if message]


def _format_status(step) -> str:
    """Return what the bar shows of a step: its index, its loss, the speed and the time left.

    A training without a limit has progress 0; then the time so far is shown instead.
    """
    loss = getattr(step, "smooth_loss", step.loss)
    if step.progress > 0:
        time = f"{step.seconds * (1 / step.progress - 1) / 60:.1f} min left"
    else:
        time = f"{step.seconds / 60:.1f} min"
    return (
        f"step {step.index}, loss {loss:.4f}, {step.images_per_second:.0f} images/s, {time}"
    )


def _add_scalars(board, row: dict, index: int) -> None:
    """Write the numbers of a row to TensorBoard."""
    for name, value in row.items():
        if isinstance(value, (int, float)):
            board.add_scalar(name, value, index)
