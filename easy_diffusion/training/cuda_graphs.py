"""CUDA graphs: a function's operations on a GPU are recorded once, and then replayed.

Python needs tens of µs to start an operation on a GPU. A training step of a small network has more
than a thousand operations, each of which takes the GPU less time than that, so the GPU waits.
Replaying a graph starts all of them by one call.

A recording holds the addresses of tensors, not their names. Therefore inputs are copied to fixed
tensors, outputs and gradients are overwritten by the next replay, and each combination of shapes
needs a recording of its own. In the function no value may be copied to the CPU, because none is
computed while it is recorded. The file needs nothing but torch.

>>> double = CudaGraphs(lambda inputs: inputs["x"] * 2, "cuda")
>>> double({"x": torch.ones(2)})            # the first three calls compute as usual
tensor([2., 2.])
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

EAGER_CALLS = 3         # with the same shapes, before they are recorded: libraries choose kernels
MAX_RECORDINGS = 16     # more shapes than these are computed without a recording
LENGTHS = 8             # captions are padded to a multiple of this number of tokens


class Recording(NamedTuple):
    """What a replay needs: it reads `inputs` and writes `outputs` and `gradients`."""

    inputs: dict[str, torch.Tensor]
    replay: Callable[[], None]
    outputs: object
    gradients: list[torch.Tensor | None]


def record_cuda_graph(function: Callable, generators, pool) -> tuple[Callable, object]:
    """Record `function()` without computing it; return what replays it, and its outputs.

    generators: the torch.Generators on the GPU that it draws from, beside PyTorch's own.
    pool: of the memory; recordings that are not replayed side by side may share one.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # thread_local: other threads, such as that of a loader, go on using the GPU.
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        outputs = function()
    return graph.replay, outputs


class CudaGraphs:
    """Calls a function of tensors; from the fourth call with the same shapes on, it replays it.

    function: maps a dict of tensors, on any device, to its outputs. It may call `backward`.
    device: the GPU.
    parameters: those whose gradients the function leaves in `grad`.
    generators: the torch.Generators on the GPU that it draws from, beside PyTorch's own.
    record: a stand-in for `record_cuda_graph`.

    The attribute `error` is "", or says which value the function copies to the CPU. Such a function
    cannot be recorded and is always called.
    """

    def __init__(self, function, device, parameters=(), generators=(), record=record_cuda_graph):
        self.function = function
        self.device = torch.device(device)
        self.parameters = list(parameters)
        self.generators = generators
        self.record = record
        self.calls = Counter()
        self.recordings: dict[tuple, Recording] = {}
        self.error = ""
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def __call__(self, inputs: dict[str, torch.Tensor]):
        """Return the outputs of the function. The next call may overwrite them."""
        shapes = tuple((name, x.shape, x.dtype, x.stride()) for name, x in inputs.items())
        if shapes not in self.recordings:
            self.calls[shapes] += 1
            if self.calls[shapes] == EAGER_CALLS and not self.error:
                return self.check(inputs)
            full = len(self.recordings) == MAX_RECORDINGS
            if self.calls[shapes] <= EAGER_CALLS or self.error or full:
                return self.function(inputs)
            self.recordings[shapes] = self.make_recording(inputs)
        return self.replay(self.recordings[shapes], inputs)

    def check(self, inputs: dict[str, torch.Tensor]):
        """Call the function, and find out whether it can be recorded."""
        if self.device.type != "cuda":
            return self.function(inputs)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self.function(inputs)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            self.error = str(error).partition("\n")[0]
            warnings.warn(f"computed without a CUDA graph: {self.error}", stacklevel=4)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return self.function(inputs)

    def make_recording(self, inputs: dict[str, torch.Tensor]) -> Recording:
        """Record the function with fixed tensors in the place of the inputs."""
        fixed = {name: torch.empty_like(x, device=self.device) for name, x in inputs.items()}
        for name, x in fixed.items():
            x.copy_(inputs[name])
        replay, outputs = self.record(lambda: self.function(fixed), self.generators, self.pool)
        return Recording(fixed, replay, outputs, [weight.grad for weight in self.parameters])

    def replay(self, recording: Recording, inputs: dict[str, torch.Tensor]):
        """Copy the inputs to their fixed tensors, and replay; the outputs are fixed, too."""
        for name, x in recording.inputs.items():
            x.copy_(inputs[name], non_blocking=True)
        recording.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients):
            parameter.grad = gradient
        return recording.outputs


# ---------------------------------------------------------------- captions as tensors


def has_tokens(encoder) -> bool:
    """Whether an encoder splits its work, as CharacterEncoder does.

    Then encoder(captions) is encoder.encode(encoder.tokenize(captions)), and PADDING is the token
    that is masked.
    """
    return all(hasattr(encoder, name) for name in ("tokenize", "encode", "PADDING"))


def has_caption_inputs(encoder) -> bool:
    """Whether `caption_inputs` can replace the call of an encoder in a recorded function."""
    if encoder is None or has_tokens(encoder):
        return True
    return not any(parameter.requires_grad for parameter in encoder.parameters())


def caption_inputs(encoder, captions: list[str]) -> dict[str, torch.Tensor]:
    """The tensors from which a recorded function computes context and mask of the captions.

    For an encoder that `has_tokens`: tokens [B, L]; its `encode` is recorded. For another one,
    which has nothing to train: context [B, L, D] and mask [B, L]. L becomes a multiple of 8, so
    that there are few shapes.
    """
    if encoder is None:
        return {}
    if has_tokens(encoder):
        tokens = encoder.tokenize(captions)
        longest = getattr(encoder, "max_length", math.inf)
        padding = int(min(-tokens.shape[1] % LENGTHS, longest - tokens.shape[1]))
        return {"tokens": F.pad(tokens, (0, padding), value=encoder.PADDING)}
    with torch.no_grad():
        context, mask = encoder(captions)
    padding = -context.shape[1] % LENGTHS
    return {
        "context": F.pad(context, (0, 0, 0, padding)), "mask": F.pad(mask, (0, padding))
    }
