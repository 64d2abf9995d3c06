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


def steps(first=0, last=30, total=30, notes=()):
    for i in range(first, last):
        if i in notes:
            warnings.warn(f"step {i} is ill", stacklevel=1)
        yield Step(i, 1 / (i + 1), 2 / (i + 1), i * 10.0, (i + 1) / total, 8.0, (0.1, 0.2, 0.3, float("nan")), "!" if i in notes else "")


def test_the_same_steps_come_through_and_a_row_for_each_tenth_is_written(tmp_path):
    seen = list(track_progress(steps(), tmp_path / "folder" / "log.csv", log_every=10, show_progress=False))
    assert [str(step) for step in seen] == [str(step) for step in steps()]
    table = list(csv.DictReader(open(tmp_path / "folder" / "log.csv")))
    assert [int(row["index"]) for row in table] == [0, 10, 20, 29]          # and for the last
    assert list(table[0]) == ["index", "loss", "smooth_loss", "seconds", "progress", "images_per_second", "quartile_1", "quartile_2",
                              "quartile_3", "quartile_4", "note"]
    assert float(table[1]["loss"]) == pytest.approx(1 / 11) and table[1]["quartile_4"] == "nan"


def test_a_killed_run_goes_on_with_its_table_and_each_step_stands_there_once(tmp_path):
    path = tmp_path / "log.csv"
    for step in track_progress(steps(), path, log_every=1, show_progress=False):
        if step.index == 17:
            break
    with open(path, "a") as file:
        file.write("18,0.05")                                               # half a row
    assert [int(row["index"]) for row in read_rows(path)] == list(range(18))
    list(track_progress(steps(12), path, log_every=1, show_progress=False))                      # its checkpoint was of step 12
    assert [int(row["index"]) for row in read_rows(path)] == list(range(30))


def test_looks_are_taken_now_and_then_and_at_the_end_and_stand_in_the_table(tmp_path):
    looked = []

    def look(step):
        looked.append(step.index)
        return {"prompt_accuracy": step.index / 100}
    list(track_progress(steps(), tmp_path / "log.csv", log_every=10, evaluate=look, sample_minutes=1.5, extra_columns=["prompt_accuracy"], show_progress=False))
    assert looked == [10, 20, 29]                                           # a step takes ten seconds
    assert [row["prompt_accuracy"] for row in read_rows(tmp_path / "log.csv")] == ["", "0.1", "0.2", "0.29"]


@pytest.mark.filterwarnings("default")
def test_the_bar_tells_loss_speed_time_left_and_sentences(capsys):
    list(track_progress(steps(notes={3, 5})))
    said = capsys.readouterr()
    said = said.out + said.err
    assert said.count("step 3 is ill") == said.count("step 5 is ill") == 1
    assert "loss 0.0667, 8 pictures/s, 0.0 min left" in said and "100%" in said


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch, capsys):
    def full(self, row):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("easy_diffusion.training.progress.CsvLog.write", full)
    assert len(list(track_progress(steps(), tmp_path / "log.csv", log_every=10))) == 30
    said = capsys.readouterr()
    assert "step 10 could not be written down, and the training goes on" in said.out + said.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_a_log_that_cannot_be_closed_stops_nothing_either(tmp_path, monkeypatch, capsys):
    real = CsvLog.__init__

    def full(self, *arguments):
        real(self, *arguments)
        self.file.close()
        self.file = open("/dev/full", "w")
        self.writer.writer = csv.writer(self.file)
    monkeypatch.setattr("easy_diffusion.training.progress.CsvLog.__init__", full)
    assert len(list(track_progress(steps(), tmp_path / "log.csv", log_every=10))) == 30
    said = capsys.readouterr()
    assert "step 10 could not be written down" in said.out + said.err and "the end of the log could not be written" in said.out + said.err


def test_the_curves_are_drawn_beside_the_table_with_a_line_where_sgd_took_over(tmp_path):
    (tmp_path / "log.csv").write_text("index,smooth_loss,learning_rate,phase,fidelity,quartile_1\n0,0.5,1e-3,adamw,,nan\n"
                                      "10,0.4,1e-3,adamw,0.5,0.1\n20,0.3,1e-6,sgd,0.75,0.2\n")
    loss, rate, fidelity = plot_curves(tmp_path / "log.csv").axes
    whole, quarter, switch = (line.get_xydata().tolist() for line in loss.lines)
    assert whole == [[0, 0.5], [10, 0.4], [20, 0.3]] and quarter[1:] == [[10, 0.1], [20, 0.2]] and [x for x, _ in switch] == [20, 20]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["all", "least noise", "sgd"]
    assert rate.lines[0].get_ydata().tolist() == [1e-3, 1e-3, 1e-6] and fidelity.lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.75]]
    list(track_progress(steps(), tmp_path / "run.csv", log_every=10, show_progress=False))
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.size == (800, 350)                                   # there is a loss alone
    assert not list(plot_curves(tmp_path / "none.csv").axes)


def test_tensorboard_gets_the_same_numbers_and_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        next(track_progress(steps(), tensorboard=tmp_path, show_progress=False))
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, index):
            written.append((name, value, index))

        def close(self):
            written.append("closed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    list(track_progress(steps(), tensorboard=tmp_path, log_every=10, show_progress=False))
    assert ("loss", 1 / 11, 10) in written and ("quartile_2", 0.2, 20) in written and written[-1] == "closed"
    assert {index for _, _, index in written[:-1]} == {0, 10, 20, 29}
