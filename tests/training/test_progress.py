"""The progress bar, the CSV log, its curves and TensorBoard.

The tests of the trainings also test the clock.
"""

import csv
import sys
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from easy_diffusion.training.progress import CsvLog, plot_curves, read_rows, track_progress


class Step(NamedTuple):
    index: int
    loss: float
    smooth_loss: float
    seconds: float
    progress: float
    images_per_second: float
    quartiles: tuple
    note: str


def make_steps(first=0, last=30, total=30, notes=()):
    """Steps `first` to `last` - 1 of a training of `total` steps; each takes ten seconds.

    notes: indices of the steps that warn and have a note.
    """
    for i in range(first, last):
        if i in notes:
            warnings.warn(f"step {i} is unhealthy", stacklevel=1)
        yield Step(
            index=i,
            loss=1 / (i + 1),
            smooth_loss=2 / (i + 1),
            seconds=i * 10.0,
            progress=(i + 1) / total,
            images_per_second=8.0,
            quartiles=(0.1, 0.2, 0.3, float("nan")),
            note="!" if i in notes else "",
        )


def captured_text(capsys):
    """What was written to stdout and stderr."""
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_steps_are_yielded_unchanged_and_every_tenth_and_the_last_are_logged(tmp_path):
    path = tmp_path / "folder" / "log.csv"
    yielded = list(track_progress(make_steps(), path, log_every=10, show_progress=False))
    assert [str(step) for step in yielded] == [str(step) for step in make_steps()]
    rows = list(csv.DictReader(open(path)))
    assert [int(row["index"]) for row in rows] == [0, 10, 20, 29]
    assert list(rows[0]) == [
        "index", "loss", "smooth_loss", "seconds", "progress", "images_per_second",
        "quartile_1", "quartile_2", "quartile_3", "quartile_4", "note",
    ]
    assert float(rows[1]["loss"]) == pytest.approx(1 / 11)
    assert rows[1]["quartile_4"] == "nan"


def test_a_resumed_training_continues_its_log_without_duplicate_steps(tmp_path):
    path = tmp_path / "log.csv"
    for step in track_progress(make_steps(), path, log_every=1, show_progress=False):
        if step.index == 17:
            break
    with open(path, "a") as file:
        file.write("18,0.05")                                   # an incomplete row
    assert [int(row["index"]) for row in read_rows(path)] == list(range(18))
    # The checkpoint was of step 12.
    list(track_progress(make_steps(12), path, log_every=1, show_progress=False))
    assert [int(row["index"]) for row in read_rows(path)] == list(range(30))


def test_evaluations_happen_at_intervals_and_at_the_end_and_are_logged(tmp_path):
    evaluated = []

    def evaluate(step):
        evaluated.append(step.index)
        return {"prompt_accuracy": step.index / 100}

    list(track_progress(
        make_steps(),
        tmp_path / "log.csv",
        log_every=10,
        evaluate=evaluate,
        evaluate_minutes=1.5,
        extra_columns=["prompt_accuracy"],
        show_progress=False,
    ))
    assert evaluated == [10, 20, 29]
    logged = [row["prompt_accuracy"] for row in read_rows(tmp_path / "log.csv")]
    assert logged == ["", "0.1", "0.2", "0.29"]


@pytest.mark.filterwarnings("default")
def test_the_bar_shows_loss_speed_and_time_left_and_each_message_once(capsys):
    list(track_progress(make_steps(notes={3, 5})))
    text = captured_text(capsys)
    assert text.count("step 3 is unhealthy") == text.count("step 5 is unhealthy") == 1
    assert "loss 0.0667, 8 images/s, 0.0 min left" in text
    assert "100%" in text


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    def write_to_full_disk(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("easy_diffusion.training.progress.CsvLog.write", write_to_full_disk)
    assert len(list(track_progress(make_steps(), tmp_path / "log.csv", log_every=10))) == 30
    assert "step 10 could not be logged; the training continues" in captured_text(capsys)


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has a file that is always full"
)
def test_a_log_that_cannot_be_closed_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    original_init = CsvLog.__init__

    def open_on_full_disk(self, *arguments):
        original_init(self, *arguments)
        self.file.close()
        self.file = open("/dev/full", "w")
        self.writer.writer = csv.writer(self.file)

    monkeypatch.setattr("easy_diffusion.training.progress.CsvLog.__init__", open_on_full_disk)
    assert len(list(track_progress(make_steps(), tmp_path / "log.csv", log_every=10))) == 30
    text = captured_text(capsys)
    assert "step 10 could not be logged" in text
    assert "the end of the log could not be written" in text


def test_curves_are_saved_beside_the_log_with_a_line_where_the_phase_changes(tmp_path):
    # A log with a column name of an earlier version, "fidelity".
    (tmp_path / "log.csv").write_text(
        "index,smooth_loss,learning_rate,phase,fidelity,quartile_1\n"
        "0,0.5,1e-3,adamw,,nan\n"
        "10,0.4,1e-3,adamw,0.5,0.1\n"
        "20,0.3,1e-6,sgd,0.75,0.2\n"
    )
    loss, rate, accuracy = plot_curves(tmp_path / "log.csv").axes
    all_timesteps, quartile, phase_change = (line.get_xydata().tolist() for line in loss.lines)
    assert all_timesteps == [[0, 0.5], [10, 0.4], [20, 0.3]]
    assert quartile[1:] == [[10, 0.1], [20, 0.2]]
    assert [x for x, _ in phase_change] == [20, 20]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["all", "least noise", "sgd"]
    assert rate.lines[0].get_ydata().tolist() == [1e-3, 1e-3, 1e-6]
    assert accuracy.lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.75]]

    list(track_progress(make_steps(), tmp_path / "run.csv", log_every=10, show_progress=False))
    with Image.open(tmp_path / "run.png") as image:
        assert image.size == (800, 350)                         # it has values for the loss alone
    assert not list(plot_curves(tmp_path / "none.csv").axes)


def test_tensorboard_gets_the_same_values_and_an_error_says_how_to_install_it(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        next(track_progress(make_steps(), tensorboard=tmp_path, show_progress=False))
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, index):
            written.append((name, value, index))

        def close(self):
            written.append("closed")

    fake_module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake_module)
    list(track_progress(make_steps(), tensorboard=tmp_path, log_every=10, show_progress=False))
    assert ("loss", 1 / 11, 10) in written
    assert ("quartile_2", 0.2, 20) in written
    assert written[-1] == "closed"
    assert {index for _, _, index in written[:-1]} == {0, 10, 20, 29}
