"""Operations of a training step: how many PyTorch starts, by name.

Each operation takes the CPU tens of µs to start on a GPU, however small its tensors are. So a small
network's step takes as long as its operations are many. Views and allocations compute nothing and
are not counted. The file needs nothing but torch.

>>> x = torch.ones(2, 3)
>>> sorted(count_operations(lambda: (x.view(6) + 1) * 2))
['aten.add.Tensor', 'aten.mul.Tensor']
"""

import collections
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations beside the views that do not compute.
FREE = ("aten._unsafe_view", "aten.lift_fresh", "aten.empty", "aten.new_empty")


class OperationCounter(TorchDispatchMode):
    """Counts the operations of this thread inside a `with` block, by name, in `counts`."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not str(function).startswith(FREE):
            self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


def count_operations(function: Callable) -> collections.Counter:
    """Call function() and return its operations by name, those of a backward pass included.

    PyTorch would compute the backward pass on a GPU in a thread of its own; here it does not.
    """
    with OperationCounter() as counter, torch.autograd.set_multithreading_enabled(False):
        function()
    return counter.counts
