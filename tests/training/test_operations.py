"""What a training step costs besides arithmetic: operations, graph breaks, waiting for the GPU."""

import traceback
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.dishes import dish_names
from easy_diffusion import presets
from easy_diffusion.training.distributed import fast_precision
from easy_diffusion.training.muon import Muon
from easy_diffusion.training.operations import count_operations
from easy_diffusion.training.trainer import train


def build_networks():
    torch.manual_seed(0)
    return presets.build_networks("".join(dish_names("train")))


def start_training(**options):
    """A training of the demo's network that has made its first steps."""
    network, encoder, diffusion = build_networks()
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    loader = [(images, ["番茄炒鸡蛋", "土豆汤", "清炒青椒", "豆腐面"])]
    steps = train(
        network, diffusion, loader, encoder, steps=1000, **presets.TRAINING | options
    )
    for _ in range(2):
        next(steps)
    return steps


def test_a_training_step_takes_at_most_2000_operations():
    steps = start_training()
    operations = count_operations(lambda: next(steps))
    assert operations.total() <= 2000, operations.most_common(20)


def test_a_step_of_muon_takes_at_most_500_operations():
    network, encoder, _ = build_networks()
    parameters = [*network.parameters(), *encoder.parameters()]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    optimizer = Muon(matrices)
    optimizer.step()
    operations = count_operations(optimizer.step)
    assert operations.total() <= 500, operations.most_common(20)


@pytest.mark.parametrize("part", ["network", "loss", "encoder"])
def test_torch_compile_finds_no_graph_break(part):
    network, encoder, diffusion = build_networks()
    tokens = encoder.tokenize(["番茄炒鸡蛋", "土豆汤"])
    context, mask = encoder.encode(tokens)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0, 999])

    function, arguments = {
        "network": (network, (x, t, context, mask)),
        "loss": (diffusion.loss, (network, x, t, context, mask)),
        "encoder": (encoder.encode, (tokens,)),
    }[part]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = function(*arguments)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(*arguments), expected)


# Where a step takes values out of a tensor, and why that does not wait for a GPU: all of these
# tensors are on the CPU. The one exception is `reduce`.
READS = {
    ("draws.py", "start_step"): "the dropped captions are drawn on the CPU",
    ("schedule.py", "check_timesteps"): "only timesteps on the CPU are checked",
    ("unet.py", "check_context"): "only a mask on the CPU is checked",
    ("trainer.py", "reduce"): "the one copy from the GPU: loss, norm and the losses of the images",
    ("distributed.py", "reduce_metrics"): "loss and norm, which `reduce` has copied",
    ("loss_history.py", "update_quartile_losses"): "the losses that `reduce` has copied",
    ("optimizers.py", "clip_grad_norm"): "the norm that `reduce` has copied",
}


def test_a_step_waits_for_the_gpu_once(monkeypatch):
    steps = start_training()
    reads = []

    def record(name):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            for frame in reversed(traceback.extract_stack()[:-1]):
                path = Path(frame.filename)
                if path.parent.parent.name == "easy_diffusion":
                    reads.append((path.name, frame.name))
                    break
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in (
        "item", "tolist", "cpu", "numpy", "nonzero",
        "__bool__", "__float__", "__int__", "__index__",
    ):
        record(name)
    next(steps)
    assert set(reads) <= READS.keys()
    assert reads.count(("trainer.py", "reduce")) == 1


class FindBfloat16(TorchDispatchMode):
    """Collects the operations inside a `with` block whose result is in bfloat16."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in tensors):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_a_gpu_without_bfloat16_computes_nothing_in_bfloat16(monkeypatch, has_bfloat16):
    """The GPU is pretended; the step runs on the CPU, in the GPU's precision."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    # The optimizers of PyTorch ask the GPU whether it is recording a graph.
    for name in ("accelerator", "cuda"):
        check = f"_{name}_graph_capture_health_check"
        monkeypatch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
    assert fast_precision() == ("bf16" if has_bfloat16 else "fp16")
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", dtype))
    with FindBfloat16() as mode:
        start_training(accelerator=accelerator)
    assert bool(mode.found) == has_bfloat16
