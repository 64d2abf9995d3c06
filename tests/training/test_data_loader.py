import itertools
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import Dishes
from easy_diffusion.training.data_loader import (
    derive_seed,
    infinite_batches,
    make_loader,
    unpack_batch,
)


def make_indices(length):
    """A dataset whose items are their own indices."""
    return torch.utils.data.TensorDataset(torch.arange(length))


def take(batches, count):
    """The first batches of an iterator over a dataset of indices, as lists."""
    return [batch.tolist() for batch, in itertools.islice(batches, count)]


def test_an_epoch_has_each_item_once_in_a_new_order():
    loader = make_loader(make_indices(60), 6)
    first, second = (torch.cat([batch for batch, in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert first != list(range(60))


def test_images_stay_uint8_and_a_given_collate_is_called():
    images, names = next(iter(make_loader(Dishes(8, 32), 4)))
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 32, 32)
    assert len(names) == 4
    assert next(iter(make_loader(Dishes(8, 32), 4, collate=len))) == 4


def test_with_cuda_workers_are_spawned_and_memory_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = make_loader(Dishes(8, 32), 4)
    assert loader.num_workers > 0
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.pin_memory
    assert loader.persistent_workers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loader = make_loader(Dishes(8, 32), 4)
    assert loader.num_workers == 0
    assert not loader.pin_memory


def test_workers_read_what_one_process_reads():
    alone, by_workers = (
        [batch.tolist() for batch, in make_loader(make_indices(12), 3, workers)]
        for workers in (0, 2)
    )
    assert alone == by_workers


def test_too_few_items_and_empty_loaders_are_refused():
    with pytest.raises(ValueError, match="3 items do not fill a batch of 4"):
        make_loader(Dishes(3, 32), 4)
    with pytest.raises(ValueError, match="batch of 0"):
        make_loader(Dishes(3, 32), 0)
    with pytest.raises(ValueError, match="yields no batch"):
        next(infinite_batches([]))


@pytest.mark.parametrize("workers, prepared", [(0, False), (2, False), (0, True)])
def test_the_order_resumes_at_any_step(workers, prepared):
    """With the loader itself, and with the one into which accelerate wraps it."""
    dataset = make_indices(23)
    whole = take(infinite_batches(make_loader(dataset, 4, workers)), 13)
    for start in (1, 4, 5, 9):              # an epoch has five batches
        loader = make_loader(dataset, 4, workers)
        if prepared:
            loader = Accelerator(mixed_precision="no").prepare(loader)
        assert take(infinite_batches(loader, start), 13 - start) == whole[start:]

    used_loader = make_loader(dataset, 4, workers)
    next(infinite_batches(used_loader, 3))  # and left in the middle of an epoch
    assert take(infinite_batches(used_loader, 5), 8) == whole[5:]
    other_seed = make_loader(dataset, 4, workers, seed=1)
    assert take(infinite_batches(other_seed), 13) != whole


class RandomItems(torch.utils.data.Dataset):
    """Items that contain a random number from each of torch, numpy and Python."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        item = [i, float(torch.rand(())), np.random.rand(), random.random()]
        return torch.tensor(item, dtype=torch.float64)


def test_the_random_numbers_of_a_dataset_belong_to_the_batch():
    """They are the same in this process, in workers, and after resuming within an epoch."""
    loader = make_loader(RandomItems(), 4)
    whole = torch.stack(list(itertools.islice(infinite_batches(loader), 13)))
    assert len(whole[:, :, 1:].unique()) == 3 * 4 * 13      # different ones in every epoch

    loader = make_loader(RandomItems(), 4, workers=2)
    in_workers = torch.stack(list(itertools.islice(infinite_batches(loader), 13)))
    assert torch.equal(in_workers, whole)

    loader = make_loader(RandomItems(), 4, workers=2)
    resumed = torch.stack(list(itertools.islice(infinite_batches(loader, 8), 5)))
    assert torch.equal(resumed, whole[8:])


def test_the_random_numbers_of_a_dataset_depend_on_the_seed():
    numbers = [
        torch.cat(list(make_loader(RandomItems(), 4, seed=seed)))[:, 1:] for seed in (0, 1)
    ]
    assert len(torch.cat(numbers).unique()) == 2 * 24 * 3


def test_reading_leaves_the_generators_of_the_caller_alone():
    def seed_all():
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed_all()
    expected = torch.rand(()), np.random.rand(), random.random()
    seed_all()
    for _ in make_loader(RandomItems(), 4):
        pass
    assert expected == (torch.rand(()), np.random.rand(), random.random())


@pytest.mark.parametrize("items, batch, world_size", [(24, 4, 2), (24, 2, 3), (25, 4, 2)])
def test_processes_divide_an_epoch_evenly_and_read_what_one_process_reads(items, batch, world_size):
    """Each item once an epoch; of 25 items one is left out, a different one in each epoch."""
    dataset = make_indices(items)
    epoch_steps = items // (batch * world_size)
    steps = 2 * epoch_steps
    by_rank = [
        take(infinite_batches(make_loader(dataset, batch), 0, rank, world_size), steps)
        for rank in range(world_size)
    ]
    of_all = [sum(batches, []) for batches in zip(*by_rank)]
    alone = take(infinite_batches(make_loader(dataset, batch * world_size)), steps)
    assert of_all == alone

    epoch = sum(of_all[:epoch_steps], [])
    assert len(set(epoch)) == len(epoch) == epoch_steps * batch * world_size
    if items != 25:
        assert sorted(epoch) == list(range(items))
    with pytest.raises(ValueError, match="do not fill 30 batches"):
        next(infinite_batches(make_loader(dataset, batch), 0, 0, 30))


def test_similar_seeds_give_uncorrelated_random_numbers():
    """The first two numbers of 2000 consecutive steps behave like independent uniform ones."""
    first = torch.stack([
        torch.rand(2, generator=torch.Generator().manual_seed(derive_seed(0, step)))
        for step in range(2000)
    ])
    assert first.mean(0).sub(0.5).abs().max() < 0.03        # standard error 0.0065
    series = torch.stack([first[:-1, 0], first[1:, 0], first[:-1, 1]])
    assert torch.corrcoef(series).triu(1).abs().max() < 0.1     # standard error 0.022


def test_images_of_totensor_are_refused():
    """Floats in [0, 1] would train as if they were latents, or images that are all bright."""
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="floats in .-1, 1.; .* leave out ToTensor"):
        unpack_batch((images, ["红", "黑"]))
    for good in (images * 2 - 1, torch.rand(2, 4, 8, 8), torch.zeros(2, 3, 8, 8), images - 0.01):
        assert unpack_batch((good, ["红", "黑"])).images is good


@pytest.mark.parametrize(
    "batch, description",
    [
        (torch.zeros(4, 3, 8, 8), r"a tensor \[4, 3, 8, 8\]"),
        ((torch.zeros(2, 3, 8, 8),), r"\(a tensor \[2, 3, 8, 8\]\)"),
        (torch.zeros(2, 3, 8, 8), r"a tensor \[2, 3, 8, 8\]"),
        ((torch.zeros(2, 3, 8, 8), ["红"]), r"a list of 1"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "pixel_values"),
    ],
)
def test_a_batch_of_another_form_is_described(batch, description):
    """A loader of tensors alone, a TensorDataset of one tensor, a dict as of transformers."""
    with pytest.raises(ValueError, match=f"a batch must be .*gave .*{description}"):
        unpack_batch(batch)
