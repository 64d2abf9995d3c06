"""Two trainings with one checkpoint: the second is refused, unless the first has ended."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.lock import training_lock
from easy_diffusion.training.trainer import train

ROOT = Path(__file__).parents[2]
# It takes the lock, says so, and waits.
HOLDER = """
import sys
from easy_diffusion.training.lock import training_lock
with training_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


class Network(torch.nn.Conv2d):
    def forward(self, x_t, t, context, mask):
        return super().forward(x_t)


def start_training(checkpoint, steps=3):
    batch = torch.zeros(2, 3, 8, 8), ["红", "黑"]
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100))
    return train(
        Network(3, 3, 1), diffusion, [batch], steps=steps, checkpoint=checkpoint,
        accelerator=Accelerator(mixed_precision="no"),
    )


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "model"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "model")], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_training_is_refused_with_the_process_of_the_first(tmp_path, holder):
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on .*model.lock"):
        next(start_training(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    next(start_training(tmp_path / "another"))


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()                           # it is a zombie until the fixture waits for it
    psutil.wait_procs([psutil.Process(holder.pid)], timeout=0.5)
    assert (tmp_path / "model.lock").exists()
    assert len(list(start_training(tmp_path / "model"))) == 3
    assert load_checkpoint(tmp_path / "model")["index"] == 3
    assert not (tmp_path / "model.lock").exists()


def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path, holder):
    lock = tmp_path / "model.lock"
    owner = json.loads(lock.read_text("utf-8"))
    lock.write_text(json.dumps(owner | {"started": owner["started"] - 1000}), "utf-8")
    with training_lock(tmp_path / "model"):
        pass


def test_the_lock_of_another_computer_is_respected(tmp_path):
    owner = {"process": 1, "started": 0.0, "computer": "another"}
    (tmp_path / "model.lock").write_text(json.dumps(owner), "utf-8")
    with pytest.raises(BlockingIOError, match="process 1 on another"):
        next(start_training(tmp_path / "model"))


def test_a_training_that_was_given_up_in_this_process_is_no_obstacle(tmp_path):
    """In a notebook a cell is interrupted and run again."""
    given_up = start_training(tmp_path / "model")
    next(given_up)
    again = start_training(tmp_path / "model")
    next(again)
    given_up.close()
    assert (tmp_path / "model.lock").exists()
    again.close()
    assert not (tmp_path / "model.lock").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_lock_is_replaced(tmp_path, content):
    (tmp_path / "model.lock").write_text(content, "utf-8")
    with training_lock(tmp_path / "model"):
        assert json.loads((tmp_path / "model.lock").read_text("utf-8"))["process"]
