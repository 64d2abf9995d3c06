import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import Dishes
from easy_diffusion.batches import batches, endless


def test_an_epoch_gives_each_item_once_in_another_order_each_time():
    numbers = torch.utils.data.TensorDataset(torch.arange(60))
    loader = batches(numbers, 6)
    epochs = [torch.cat([batch for batch, in loader]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(60)) and epochs[0] != epochs[1] and epochs[0] != list(range(60))


def test_pictures_stay_bytes_and_a_collate_of_ones_own_is_called():
    pictures, names = next(iter(batches(Dishes(8, 32), 4)))
    assert pictures.dtype == torch.uint8 and pictures.shape == (4, 3, 32, 32) and len(names) == 4
    assert next(iter(batches(Dishes(8, 32), 4, collate=len))) == 4


def test_with_cuda_workers_are_spawned_and_memory_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = batches(Dishes(8, 32), 4)
    assert loader.num_workers > 0 and loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.pin_memory and loader.persistent_workers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loader = batches(Dishes(8, 32), 4)
    assert loader.num_workers == 0 and not loader.pin_memory


def test_workers_give_what_one_process_gives():
    numbers = torch.utils.data.TensorDataset(torch.arange(12))
    alone, together = ([batch.tolist() for batch, in batches(numbers, 3, workers)] for workers in (0, 2))
    assert alone == together


def test_too_few_items_and_empty_loaders_are_named():
    with pytest.raises(ValueError, match="3 items do not fill a batch of 4"):
        batches(Dishes(3, 32), 4)
    with pytest.raises(ValueError, match="batch of 0"):
        batches(Dishes(3, 32), 0)
    with pytest.raises(ValueError, match="gives no batch"):
        next(endless([]))


@pytest.mark.parametrize("workers, prepared", [(0, False), (2, False), (0, True)])
def test_the_order_goes_on_from_any_step(workers, prepared):
    """Of the loader itself, and as accelerate wraps it."""
    numbers = torch.utils.data.TensorDataset(torch.arange(23))
    whole = [next_batch[0].tolist() for next_batch, _ in zip(endless(batches(numbers, 4, workers)), range(13))]
    for start in (1, 4, 5, 9):                                              # five batches an epoch
        loader = batches(numbers, 4, workers)
        later = endless(Accelerator(mixed_precision="no").prepare(loader) if prepared else loader, start)
        assert [batch[0].tolist() for batch, _ in zip(later, range(13 - start))] == whole[start:]
    again = batches(numbers, 4, workers)
    next(endless(again, 3))                                                 # a loader that was used before, and left in the middle
    assert [batch[0].tolist() for batch, _ in zip(endless(again, 5), range(8))] == whole[5:]
    assert whole != [batch[0].tolist() for batch, _ in zip(endless(batches(numbers, 4, workers, seed=1)), range(13))]
