import pytest
import torch

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
    loader = batches(numbers, 3, workers=2)
    assert sorted(torch.cat([batch for batch, in loader]).tolist()) == list(range(12))


def test_too_few_items_and_empty_loaders_are_named():
    with pytest.raises(ValueError, match="3 items do not fill a batch of 4"):
        batches(Dishes(3, 32), 4)
    with pytest.raises(ValueError, match="gives no batch"):
        next(endless([]))
