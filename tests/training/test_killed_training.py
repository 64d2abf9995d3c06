"""A run that is killed, or that has several processes, ends with the weights of an unbroken run."""

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

CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")

# ---------------------------------------------------------------- the training


class Crops(torch.utils.data.Dataset):
    """32 images; the caption is the image's number.

    With random_crops they are cropped and flipped by numbers from torch, numpy and Python.
    """

    def __init__(self, random_crops):
        self.random_crops = random_crops

    def __len__(self):
        return 32

    def __getitem__(self, i):
        image = torch.arange(12 * 12 * 3, dtype=torch.float32).view(3, 12, 12) * (i + 1) % 256
        x = 0
        y = 0
        flip = False
        if self.random_crops:
            x = int(torch.randint(5, ()))
            y = np.random.randint(5)
            flip = random.random() < 0.5
        image = image[:, y:y + 8, x:x + 8]
        if flip:
            image = image.flip(2)
        return image.to(torch.uint8), str(i)


class RecordingEncoder(torch.nn.Module):
    """An encoder that records the captions that it encodes."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(33, 8)
        self.encoded = []

    def forward(self, captions):
        self.encoded += captions
        indices = torch.tensor([[int(caption or 32)] for caption in captions])
        mask = torch.ones(len(captions), 1, dtype=torch.bool)
        return self.table(indices), mask


class Tiny(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.conv_out = torch.nn.Conv2d(8, 3, 3, padding=1)
        self.context_layer = torch.nn.Linear(8, 8)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x_t, t, context, mask):
        h = self.conv_in(x_t) + self.context_layer(context[:, 0])[:, :, None, None]
        h = self.dropout(torch.nn.functional.silu(h))
        return self.conv_out(h * (1 + t / 100)[:, None, None, None])


def is_second_process():
    return os.environ.get("RANK") == "1"


class TinyWithLittleMemory(Tiny):
    """In the second process there is memory for two images only."""

    def forward(self, x_t, t, context, mask):
        if len(x_t) > 2 and is_second_process():
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x_t, t, context, mask)


class TinyWithoutMemory(TinyWithLittleMemory):
    """In the second process there is memory for two images only, and for none in the fourth step.
    """

    calls = 0

    def forward(self, x_t, t, context, mask):
        self.calls += 1
        # One call fails in the first step; then there are two calls in each step.
        if self.calls > 7 and is_second_process():
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x_t, t, context, mask)


def run(
    checkpoint,
    steps,
    batch,
    workers=0,
    random_crops=True,
    dropout=0.2,
    caption_dropout=0.1,
    muon=3e-3,
    save_seconds=0.0,
    network_class=Tiny,
):
    """Yields (step, encoder). AdamW with Muon; SGD after step 200."""
    torch.manual_seed(0)
    network = network_class(dropout)
    encoder = RecordingEncoder()
    training = train(
        network,
        GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="v"),
        make_loader(Crops(random_crops), batch, workers),
        encoder,
        steps=steps,
        checkpoint=checkpoint,
        save_seconds=save_seconds,
        learning_rate=1e-3,
        muon_learning_rate=muon,
        caption_dropout=caption_dropout,
        warmup=2,
        ema=0.9,
        window=60,
        keep=2,
        plateaued=lambda losses, window: len(losses) > 180,
        accelerator=Accelerator(cpu=True, mixed_precision="no"),
    )
    for step in training:
        yield step, encoder


# ---------------------------------------------------------------- processes that run and are killed


def run_process(rank, world_size, port, done, encoded, log, options):
    """The main function of a process: a run, alone or as one of several; it logs each step."""
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()                # a forked process has the state of earlier tests
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            ACCELERATE_USE_CPU="true",
        )
    with open(log, "a") as file:
        for step, encoder in run(**options):
            file.write(f"{step.index}\n")
            file.flush()
            done.value = step.index + 1
    encoded.put((rank, encoder.encoded))
    if world_size > 1:
        torch.distributed.destroy_process_group()


def start(log, world_size=1, **options):
    """Start a run; return its processes, a counter of its steps, and a queue.

    The queue receives (rank, encoded captions) from each process that ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = CONTEXT.Value("i", 0)
    encoded = CONTEXT.Queue()
    processes = []
    for rank in range(world_size):
        process_log = log if rank == 0 else os.devnull
        arguments = (rank, world_size, port, done, encoded, process_log, options)
        processes.append(CONTEXT.Process(target=run_process, args=arguments))
    for process in processes:
        process.start()
    return processes, done, encoded


def run_to_the_end(log, world_size=1, **options):
    """Returns the encoded captions of each process."""
    processes, _, encoded = start(log, world_size, **options)
    captions = dict(encoded.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [captions[rank] for rank in range(world_size)]


def run_and_kill(log, min_steps, rng, world_size=1, **options):
    """Kill a run at a random moment after some steps of its own; False if it ended before.

    min_steps: number of these steps; with 0 it is killed while it starts. Every other run with some
        steps is killed as soon as it is seen to write a checkpoint.
    """
    processes, done, _ = start(log, world_size, **options)
    first = 0
    if options["checkpoint"].exists():
        first = load_checkpoint(options["checkpoint"])["index"]
    while min_steps and done.value < first + min_steps:
        if not all(process.is_alive() for process in processes):
            break
        time.sleep(0.0005)
    if min_steps and rng.random() < 0.5:
        folder = options["checkpoint"].parent
        while not any(folder.glob("*.writing")) and all(p.is_alive() for p in processes):
            pass
    else:
        time.sleep(rng.uniform(0, 0.012 if min_steps else 0.1))
    for process in rng.sample(processes, len(processes)):
        process.kill()
    for process in processes:
        process.join()
    return processes[0].exitcode == -signal.SIGKILL


def load_final_weights(path):
    """The weights and the EMA weights of a finished run."""
    saved = load_checkpoint(path)
    assert saved["progress"] == 1
    return saved["models"] | {f"ema {name}": tensor for name, tensor in saved["ema"].items()}


def assert_identical(weights, other):
    assert weights.keys() == other.keys()
    assert len(weights) == 14
    assert [name for name in weights if not torch.equal(weights[name], other[name])] == []


def max_difference(weights, other):
    return max(float((weights[name] - other[name]).abs().max()) for name in weights)


# ---------------------------------------------------------------- tests


def test_fifty_kills_at_random_moments_change_no_bit(tmp_path):
    """A checkpoint is written at each step, so that most kills interrupt the writing of one."""
    rng = random.Random(0)
    options = dict(steps=300, batch=5)
    unbroken = tmp_path / "unbroken"
    run_to_the_end(tmp_path / "unbroken.log", checkpoint=unbroken, save_seconds=1e9, **options)

    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "c"
    log = tmp_path / "killed.log"
    interrupted_writes = 0
    for _ in range(50):
        min_steps = rng.choice([0, 1, 1, 2, 3])
        was_killed = run_and_kill(log, min_steps, rng, checkpoint=path, **options)
        assert was_killed, "the run ended too early"
        names = os.listdir(tmp_path / "run")
        interrupted_writes += any(name.endswith(".writing") for name in names)
    run_to_the_end(log, checkpoint=path, **options)

    assert_identical(load_final_weights(unbroken), load_final_weights(path))
    saved = load_checkpoint(path)
    assert saved["phase"] == "sgd"
    assert saved["losses"] == load_checkpoint(unbroken)["losses"]
    indices = [int(line) for line in log.read_text().split()]
    assert indices == sorted(set(indices))  # no step that was yielded is repeated
    assert len(indices) > 200
    assert interrupted_writes >= 5
    assert {file.name for file in path.parent.iterdir()} == {"c", "c.1", "c.best"}


@pytest.mark.parametrize("world_size, workers", [(1, 2), (2, 0)])
def test_a_killed_run_with_workers_or_two_processes_ends_the_same(tmp_path, world_size, workers):
    rng = random.Random(1)
    options = dict(world_size=world_size, steps=24, batch=5, workers=workers)
    run_to_the_end(tmp_path / "unbroken.log", checkpoint=tmp_path / "unbroken", **options)
    path = tmp_path / "c"
    log = tmp_path / "killed.log"
    for min_steps in (3, 4):
        assert run_and_kill(log, min_steps, rng, checkpoint=path, **options)
    run_to_the_end(log, checkpoint=path, **options)
    assert_identical(load_final_weights(tmp_path / "unbroken"), load_final_weights(path))


def test_two_processes_learn_what_one_learns_with_a_batch_twice_as_large(tmp_path):
    """And they read each image once an epoch.

    Without crops and dropout, which are random in each process by itself. There are 32 images and
    16 of them in a step, so 20 steps are ten epochs.
    """
    options = dict(steps=20, random_crops=False, dropout=0.0, caption_dropout=0.0, muon=None)
    log = tmp_path / "log"
    by_one, = run_to_the_end(log, checkpoint=tmp_path / "one", batch=16, **options)
    by_two = run_to_the_end(log, world_size=2, checkpoint=tmp_path / "two", batch=8, **options)

    weights = load_final_weights(tmp_path / "one")
    torch.manual_seed(0)
    initial = {f"network.{name}": tensor for name, tensor in Tiny(0.0).state_dict().items()}
    assert max_difference(initial, weights) > 5e-3
    assert max_difference(weights, load_final_weights(tmp_path / "two")) < 1e-5

    for epoch in range(10):
        captions = [
            caption
            for of_process in by_two
            for caption in of_process[16 * epoch:16 * (epoch + 1)]
        ]
        assert sorted(map(int, captions)) == list(range(32))
    assert sorted(by_one[:32]) == sorted(map(str, range(32)))


def test_if_one_of_two_processes_runs_out_of_memory_both_use_micro_batches(tmp_path):
    log = tmp_path / "log"
    options = dict(world_size=2, steps=12, batch=4, dropout=0.0, muon=None)
    run_to_the_end(log, checkpoint=tmp_path / "unlimited", **options)

    options["network_class"] = TinyWithLittleMemory
    path = tmp_path / "limited"
    assert run_and_kill(log, 3, random.Random(0), checkpoint=path, **options)
    run_to_the_end(log, checkpoint=path, **options)     # it resumes with two micro-batches
    saved = load_checkpoint(path)
    assert saved["micro_batches"] == 2
    assert saved["micro_batches_doubled"]
    assert not load_checkpoint(tmp_path / "unlimited")["micro_batches_doubled"]
    unlimited = load_final_weights(tmp_path / "unlimited")
    assert max_difference(unlimited, load_final_weights(path)) < 1e-5


def test_if_one_of_two_processes_has_no_memory_at_all_both_end(tmp_path):
    """Neither waits for the other for ever."""
    path = tmp_path / "c"
    options = dict(steps=12, batch=4, dropout=0.0, muon=None, network_class=TinyWithoutMemory)
    processes, done, _ = start(os.devnull, world_size=2, checkpoint=path, **options)
    for process in processes:
        process.join(60)
        assert process.exitcode == 1
    assert done.value == 3
    assert load_checkpoint(path)["index"] >= 2
