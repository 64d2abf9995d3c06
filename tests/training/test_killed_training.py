"""A run that is killed as often as one likes, and one of several processes, end with the weights of an unbroken run of one process."""

import multiprocessing
import os
import random
import signal
import socket
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.training.checkpoint import load_checkpoint
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.trainer import train

CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


class Crops(torch.utils.data.Dataset):
    """32 pictures, each cut where torch's, numpy's and Python's dice say, if there are dice; the caption is its number."""

    def __init__(self, dice):
        self.dice = dice

    def __len__(self):
        return 32

    def __getitem__(self, i):
        picture = torch.arange(12 * 12 * 3, dtype=torch.float32).view(3, 12, 12) * (i + 1) % 256
        x, y, turned = (int(torch.randint(5, ())), np.random.randint(5), random.random() < 0.5) if self.dice else (0, 0, False)
        picture = picture[:, y:y + 8, x:x + 8]
        return (picture.flip(2) if turned else picture).to(torch.uint8), str(i)


class Words(torch.nn.Module):
    """An encoder that remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.table, self.asked = torch.nn.Embedding(33, 8), []

    def forward(self, captions):
        self.asked += captions
        return self.table(torch.tensor([[int(caption or 32)] for caption in captions])), torch.ones(len(captions), 1, dtype=torch.bool)


class Tiny(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.first, self.last, self.words = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1), torch.nn.Linear(8, 8)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x_t, t, context, mask):
        h = torch.nn.functional.silu(self.first(x_t) + self.words(context[:, 0])[:, :, None, None])
        return self.last(self.dropout(h) * (1 + t / 100)[:, None, None, None])


class Tight(Tiny):
    """One that finds memory for two pictures only, in the second process."""

    def forward(self, x_t, t, context, mask):
        if len(x_t) > 2 and os.environ.get("RANK") == "1":
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x_t, t, context, mask)


def run(checkpoint, steps, batch, workers=0, dice=True, dropout=0.2, caption_dropout=0.1, muon=3e-3, save_seconds=0.0, kind=Tiny):
    torch.manual_seed(0)
    network, encoder = kind(dropout), Words()
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="v")
    yield from ((step, encoder) for step in train(
        network, diffusion, make_loader(Crops(dice), batch, workers), encoder, steps=steps, checkpoint=checkpoint, save_seconds=save_seconds,
        learning_rate=1e-3, muon_learning_rate=muon, caption_dropout=caption_dropout, warmup=2, ema=0.9, window=60, keep=2,
        plateaued=lambda losses, window: len(losses) > 180, accelerator=Accelerator(cpu=True, mixed_precision="no")))


def life(process, processes, port, done, asked, log, options):
    """What a forked process does: a run, alone or as one of several, that writes down each step's number."""
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):           # what the tests before have left
        state._reset_state()
    if processes > 1:
        os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    with open(log, "a") as file:
        for step, encoder in run(**options):
            file.write(f"{step.index}\n")
            file.flush()
            done.value = step.index + 1
    asked.put((process, encoder.asked))
    if processes > 1:
        torch.distributed.destroy_process_group()


def start(log, processes=1, **options):
    """[processes], a counter of the steps done, and a queue of the captions that each was asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done, asked = CONTEXT.Value("i", 0), CONTEXT.Queue()
    lives = [CONTEXT.Process(target=life, args=(i, processes, port, done, asked, log if i == 0 else os.devnull, options))
             for i in range(processes)]
    for each in lives:
        each.start()
    return lives, done, asked


def finish(log, processes=1, **options):
    lives, _, asked = start(log, processes, **options)
    captions = dict(asked.get(timeout=60) for _ in lives)
    for each in lives:
        each.join()
        assert each.exitcode == 0
    return [captions[i] for i in range(processes)]


def killed(log, after, chance, processes=1, **options):
    """A life that ends by SIGKILL at a random moment after this many steps of its own; False if it came to its end before."""
    lives, done, _ = start(log, processes, **options)
    began = load_checkpoint(options["checkpoint"])["index"] if options["checkpoint"].exists() else 0
    while after and done.value < began + after and all(each.is_alive() for each in lives):
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.012 if after else 0.1))                  # without a step of its own: while it begins
    for each in chance.sample(lives, len(lives)):
        each.kill()
    for each in lives:
        each.join()
    return lives[0].exitcode == -signal.SIGKILL


def weights(path):
    saved = load_checkpoint(path)
    assert saved["progress"] == 1
    return saved["models"] | {f"average {name}": tensor for name, tensor in saved["ema"].items()}


def assert_identical(a, b):
    assert a.keys() == b.keys() and len(a) == 14
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_fifty_kills_at_random_moments_change_no_bit(tmp_path):
    """Checkpoints are written at each step, so that most kills fall into the writing of one; AdamW with Muon, then SGD after step 200."""
    chance, options = random.Random(0), dict(steps=300, batch=5)
    finish(tmp_path / "whole.log", checkpoint=tmp_path / "whole", save_seconds=1e9, **options)
    (tmp_path / "run").mkdir()
    path, log, writing = tmp_path / "run" / "c", tmp_path / "broken.log", 0
    for i in range(50):
        assert killed(log, chance.choice([0, 1, 1, 2, 3]), chance, checkpoint=path, **options), "the run was over too early"
        writing += any(name.endswith(".writing") for name in os.listdir(tmp_path / "run"))
    finish(log, checkpoint=path, **options)
    assert_identical(weights(tmp_path / "whole"), weights(path))
    assert load_checkpoint(path)["phase"] == "sgd" and load_checkpoint(path)["losses"] == load_checkpoint(tmp_path / "whole")["losses"]
    numbers = [int(line) for line in log.read_text().split()]
    assert numbers == sorted(set(numbers)) and len(numbers) > 200           # no step that was told is done again
    assert writing >= 5                                                     # kills that left a file half written
    assert {p.name for p in path.parent.iterdir()} == {"c", "c.1", "c.best"}


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 0)])
def test_killed_with_workers_or_as_two_processes_it_ends_the_same(tmp_path, processes, workers):
    chance, options = random.Random(1), dict(processes=processes, steps=24, batch=5, workers=workers)
    finish(tmp_path / "whole.log", checkpoint=tmp_path / "whole", **options)
    for after in (3, 4):
        assert killed(tmp_path / "broken.log", after, chance, checkpoint=tmp_path / "c", **options)
    finish(tmp_path / "broken.log", checkpoint=tmp_path / "c", **options)
    assert_identical(weights(tmp_path / "whole"), weights(tmp_path / "c"))


def test_two_processes_learn_what_one_learns_with_the_double_batch_and_see_each_record_once_an_epoch(tmp_path):
    """Without crops and dropout, whose dice are each process's own. 32 records, 16 in a step of both: 20 steps are ten epochs."""
    options = dict(steps=20, dice=False, dropout=0.0, caption_dropout=0.0, muon=None)
    one, = finish(tmp_path / "log", checkpoint=tmp_path / "one", batch=16, **options)
    two = finish(tmp_path / "log", processes=2, checkpoint=tmp_path / "two", batch=8, **options)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    torch.manual_seed(0)
    moved = max(float((a[f"network.{name}"] - weight).abs().max()) for name, weight in Tiny(0.0).state_dict().items())
    assert moved > 5e-3 and max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    for epoch in range(10):
        seen = [captions[16 * epoch:16 * (epoch + 1)] for captions in two]
        assert sorted(map(int, seen[0] + seen[1])) == list(range(32))
    assert sorted(one[:32]) == sorted(map(str, range(32)))


def test_where_one_of_two_processes_runs_out_of_memory_both_take_their_batch_in_pieces(tmp_path):
    options = dict(processes=2, steps=12, batch=4, dropout=0.0, muon=None)
    finish(tmp_path / "log", checkpoint=tmp_path / "roomy", **options)
    assert killed(tmp_path / "log", 3, random.Random(0), checkpoint=tmp_path / "tight", kind=Tight, **options)
    finish(tmp_path / "log", checkpoint=tmp_path / "tight", kind=Tight, **options)                        # and remember it
    saved = load_checkpoint(tmp_path / "tight")
    assert saved["micro_batches"] == 2 and saved["micro_batches_doubled"] and not load_checkpoint(tmp_path / "roomy")["micro_batches_doubled"]
    a, b = weights(tmp_path / "roomy"), weights(tmp_path / "tight")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


class Tighter(Tight):
    """One whose second process finds memory for two pictures only, and in the fourth step for none."""
    calls = 0

    def forward(self, x_t, t, context, mask):
        self.calls += 1
        if self.calls > 7 and os.environ.get("RANK") == "1":                # 1 in vain, then 2 a step
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x_t, t, context, mask)


def test_where_one_of_two_has_no_memory_at_all_both_end_and_none_waits_for_the_other(tmp_path):
    lives, done, _ = start(os.devnull, processes=2, steps=12, batch=4, dropout=0.0, muon=None, kind=Tighter, checkpoint=tmp_path / "c")
    for each in lives:
        each.join(60)
        assert each.exitcode == 1
    assert done.value == 3 and load_checkpoint(tmp_path / "c")["index"] >= 2
