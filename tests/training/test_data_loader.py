import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import Dishes
from easy_diffusion.training.data_loader import derive_seed, infinite_batches, make_loader


def test_an_epoch_gives_each_item_once_in_another_order_each_time():
    numbers = torch.utils.data.TensorDataset(torch.arange(60))
    loader = make_loader(numbers, 6)
    epochs = [torch.cat([batch for batch, in loader]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(60)) and epochs[0] != epochs[1] and epochs[0] != list(range(60))


def test_pictures_stay_bytes_and_a_collate_of_ones_own_is_called():
    pictures, names = next(iter(make_loader(Dishes(8, 32), 4)))
    assert pictures.dtype == torch.uint8 and pictures.shape == (4, 3, 32, 32) and len(names) == 4
    assert next(iter(make_loader(Dishes(8, 32), 4, collate=len))) == 4


def test_with_cuda_workers_are_spawned_and_memory_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = make_loader(Dishes(8, 32), 4)
    assert loader.num_workers > 0 and loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.pin_memory and loader.persistent_workers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loader = make_loader(Dishes(8, 32), 4)
    assert loader.num_workers == 0 and not loader.pin_memory


def test_workers_give_what_one_process_gives():
    numbers = torch.utils.data.TensorDataset(torch.arange(12))
    alone, together = ([batch.tolist() for batch, in make_loader(numbers, 3, workers)] for workers in (0, 2))
    assert alone == together


def test_too_few_items_and_empty_loaders_are_named():
    with pytest.raises(ValueError, match="3 items do not fill a batch of 4"):
        make_loader(Dishes(3, 32), 4)
    with pytest.raises(ValueError, match="batch of 0"):
        make_loader(Dishes(3, 32), 0)
    with pytest.raises(ValueError, match="gives no batch"):
        next(infinite_batches([]))


@pytest.mark.parametrize("workers, prepared", [(0, False), (2, False), (0, True)])
def test_the_order_goes_on_from_any_step(workers, prepared):
    """Of the loader itself, and as accelerate wraps it."""
    numbers = torch.utils.data.TensorDataset(torch.arange(23))
    whole = [next_batch[0].tolist() for next_batch, _ in zip(infinite_batches(make_loader(numbers, 4, workers)), range(13))]
    for start in (1, 4, 5, 9):                                              # five batches an epoch
        loader = make_loader(numbers, 4, workers)
        later = infinite_batches(Accelerator(mixed_precision="no").prepare(loader) if prepared else loader, start)
        assert [batch[0].tolist() for batch, _ in zip(later, range(13 - start))] == whole[start:]
    again = make_loader(numbers, 4, workers)
    next(infinite_batches(again, 3))                                                 # a loader that was used before, and left in the middle
    assert [batch[0].tolist() for batch, _ in zip(infinite_batches(again, 5), range(8))] == whole[5:]
    assert whole != [batch[0].tolist() for batch, _ in zip(infinite_batches(make_loader(numbers, 4, workers, seed=1)), range(13))]


class Dice(torch.utils.data.Dataset):
    """Items that torch's, numpy's and Python's generators have a say in."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return torch.tensor([i, float(torch.rand(())), np.random.rand(), random.random()], dtype=torch.float64)


def test_what_a_dataset_draws_by_chance_belongs_to_the_batch_whoever_reads_it():
    """In this process, in workers, or by a run that goes on in the middle of an epoch."""
    whole = [batch for batch, _ in zip(infinite_batches(make_loader(Dice(), 4)), range(13))]
    assert len(torch.cat(whole)[:, 1:].unique()) == 3 * 4 * 13              # no two draws are the same, in another epoch neither
    in_workers = [batch for batch, _ in zip(infinite_batches(make_loader(Dice(), 4, workers=2)), range(13))]
    later = [batch for batch, _ in zip(infinite_batches(make_loader(Dice(), 4, workers=2), 8), range(5))]
    assert torch.equal(torch.stack(in_workers), torch.stack(whole)) and torch.equal(torch.stack(later), torch.stack(whole[8:]))


def test_reading_leaves_the_generators_of_the_caller_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    for _ in make_loader(Dice(), 4):
        pass
    assert expected == (torch.rand(()), np.random.rand(), random.random())


@pytest.mark.parametrize("items, batch, processes", [(24, 4, 2), (24, 2, 3), (25, 4, 2)])
def test_processes_share_an_epoch_evenly_and_see_together_what_one_sees(items, batch, processes):
    """Each record once an epoch; of 25 one is left out, another in each epoch."""
    numbers, steps = torch.utils.data.TensorDataset(torch.arange(items)), 2 * (items // (batch * processes))
    shares = [[step[0].tolist() for step, _ in zip(infinite_batches(make_loader(numbers, batch), 0, i, processes), range(steps))]
              for i in range(processes)]
    together = [sum(parts, []) for parts in zip(*shares)]
    assert together == [step[0].tolist() for step, _ in zip(infinite_batches(make_loader(numbers, batch * processes)), range(steps))]
    epoch = sum(together[:steps // 2], [])
    assert len(set(epoch)) == len(epoch) == items // (batch * processes) * batch * processes
    assert items == 25 or sorted(epoch) == list(range(items))
    with pytest.raises(ValueError, match="do not fill 30 batches"):
        next(infinite_batches(make_loader(numbers, batch), 0, 0, 30))


def test_near_seeds_have_nothing_in_common():
    """The first draws of 2000 steps are as even and as unlike as any 2000 draws."""
    first = torch.stack([torch.rand(2, generator=torch.Generator().manual_seed(derive_seed(0, i))) for i in range(2000)])
    assert first.mean(0).sub(0.5).abs().max() < 0.03                        # a deviation of 0.0065
    assert torch.corrcoef(torch.stack([first[:-1, 0], first[1:, 0], first[:-1, 1]])).triu(1).abs().max() < 0.1      # of 0.022
