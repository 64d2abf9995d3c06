import pytest
import torch

from easy_diffusion.training.memory import catch_out_of_memory, find_largest_batch, free_memory

OUT_OF_MEMORY_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
)
OTHER_ERRORS = (
    RuntimeError("shapes differ"),
    NotImplementedError("no kernel"),
    RecursionError(),
    ValueError("out of memory"),
)


def test_only_out_of_memory_errors_are_caught():
    calls = []

    def fail(error):
        calls.append(error)
        raise error

    for error in OUT_OF_MEMORY_ERRORS:
        assert catch_out_of_memory(fail, error) is None
        assert calls[-1] is error
    for error in OTHER_ERRORS:
        with pytest.raises(type(error)):
            catch_out_of_memory(fail, error)
    assert catch_out_of_memory(lambda a: a + 1, 2) == 3


def test_the_error_that_torch_raises_on_a_cpu_is_caught():
    size = 2 ** 50                          # four pebibytes of float32
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.zeros(size)
    assert catch_out_of_memory(torch.zeros, size) is None


def make_step(limit, tried):
    """A training step that runs out of memory with more than `limit` images."""

    def step(images):
        tried.append(images)
        if images > limit:
            raise torch.OutOfMemoryError

    return step


def test_the_largest_batch_is_found_by_doubling():
    tried = []
    assert find_largest_batch(make_step(100, tried)) == 64
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128]
    assert find_largest_batch(lambda images: None, max_batch=16) == 16
    with pytest.raises(MemoryError, match="not enough memory for a step with one"):
        find_largest_batch(make_step(0, []))


def test_the_largest_batch_is_within_the_given_precision():
    tried = []
    assert find_largest_batch(make_step(100, tried), within=0) == 100
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104, 100, 102, 101]
    for limit in (1, 2, 3, 31, 63, 65, 100, 199):
        largest = find_largest_batch(make_step(limit, []), within=1 / 32)
        assert limit - max(1, limit / 32) < largest <= limit


@pytest.mark.parametrize("max_batch", [1, 3, 16, 100])
def test_no_batch_above_the_maximum_is_tried(max_batch):
    tried = []
    largest = find_largest_batch(make_step(1000, tried), max_batch)
    assert largest == 2 ** (max_batch.bit_length() - 1)     # the largest power of two below
    assert find_largest_batch(make_step(1000, tried), max_batch, within=0) == max_batch
    assert max(tried) == max_batch


def test_all_processes_must_agree_that_a_batch_fits():
    asked = []

    def all_agree(fits):
        asked.append(fits)
        return fits and len(asked) < 7      # the seventh time another process disagrees

    assert find_largest_batch(lambda images: None, all_agree=all_agree) == 4
    # Twice for each size: is there enough memory to try, and was there enough?
    assert asked == [True] * 7


def test_free_memory_is_a_plausible_number_of_bytes():
    assert 0 < free_memory() < 2 ** 50
