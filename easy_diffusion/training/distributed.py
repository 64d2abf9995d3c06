"""What training processes exchange, the fastest precision, and whether PyTorch fits the GPU.

W processes train one model. Each computes the gradient g_k of its own part of the batch; the
optimizer steps along their mean, so W processes learn like one with a batch W times as large:

    g = (1 / W) Σ_k g_k

All processes must take the same decisions: go on from the same step, skip the same steps, stop
at the same time. Therefore flags, losses and the time are exchanged, too. With one process all
functions below return at once. The file needs torch and accelerate.

>>> accelerator = default_accelerator()
>>> any_rank(accelerator, False)
False
>>> reduce_metrics(accelerator, torch.tensor(0.5), torch.tensor(2.0), seconds=1.5)
(0.5, 2.0, 1.5)
"""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast

# ---------------------------------------------------------------- precision and GPU

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def fast_precision() -> str:
    """The fastest of accelerate's `mixed_precision`: "bf16", "fp16" or "no" (float32).

    bfloat16 needs compute capability 8.0 (A100, RTX 30) or a CPU with AVX-512 bf16 or AMX. From 7.0
    on (V100, T4) a GPU multiplies matrices of float16 about eight times as fast as of float32.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability() >= (7, 0) else "no"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    supported = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return "bf16" if supported else "no"


def autocast(device):
    """Context manager for sampling in `fast_precision`."""
    precision = fast_precision()
    device_type = torch.device(device).type
    return torch.autocast(device_type, DTYPES[precision], enabled=precision != "no")


def default_device() -> torch.device:
    """The device for sampling: an NVIDIA GPU, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_accelerator() -> Accelerator:
    """An Accelerator with `fast_precision`.

    A process has one precision only: if it has made an Accelerator before, that one's is kept.
    """
    exists = AcceleratorState._shared_state
    return Accelerator(mixed_precision=None if exists else fast_precision())


def compute_dtype(accelerator) -> torch.dtype:
    """The dtype in which layers compute under `accelerator.autocast()`."""
    device_type = accelerator.device.type
    with accelerator.autocast():
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return torch.float32


def check_gpu() -> None:
    """Exit with a message if this build of PyTorch has no kernels for the GPU.

    Raises SystemExit.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.zeros(1, device="cuda").add_(1)
        return
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
    capability = torch.cuda.get_device_capability()
    if capability < (7, 0):
        advice = (
            "install a build for CUDA 12.6, of PyTorch 2.14 at most, from PyTorch's own index: "
            "https://download.pytorch.org/whl/cu126"
        )
    elif capability < (7, 5):
        advice = "install requirements-volta.txt in its place"
    else:
        advice = "install a newer PyTorch"
    raise SystemExit(
        f"PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name()}, compute "
        f"capability {'.'.join(map(str, capability))}: {advice}; "
        "or set CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
    )


# ---------------------------------------------------------------- collectives


def check_same_step(accelerator, path, index: int) -> None:
    """Raise ValueError unless all processes resume at the same step.

    path: the checkpoint, for the message.
    index: the step at which this process resumes.
    """
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.tensor(index, device=accelerator.device), "sum")
        if any_rank(accelerator, int(total) != index * accelerator.num_processes):
            raise ValueError(
                f"this process resumes at step {index}, another one at a different step: "
                f"{path} must be on a disk that all processes share"
            )


def broadcast_parameters(accelerator, module) -> None:
    """Copy the parameters and buffers of the main process to all others."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.copy_(broadcast(tensor))


def average_gradients(accelerator, parameters) -> None:
    """Replace each gradient by its mean over all processes, with one message.

    It is called after every process has computed its gradients. A process that runs out of memory
    before can thus tell the others, which would otherwise wait for its message for ever.
    """
    if accelerator.num_processes > 1:
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in parameters
        ]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        mean = accelerator.reduce(flat, "mean")
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient in zip(parameters, mean.split(sizes)):
            parameter.grad = gradient.view_as(parameter)


def any_rank(accelerator, flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if accelerator.num_processes == 1:
        return flag
    flag = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum"))


def main_process_first(accelerator, function: Callable, seconds: float = 1.0):
    """Return function(), which the main process calls first, then that of each machine, then all.

    What the function writes to a disk is thus written once per disk. However long that takes, the
    processes that wait exchange a flag every few `seconds`, because a process group ends with an
    error if one process waits for another for too long (10 minutes with NCCL).
    """
    if accelerator.num_processes == 1:
        return function()
    if accelerator.is_main_process:
        own_turn = 0
    else:
        own_turn = 1 if accelerator.is_local_main_process else 2
    task = None
    with ThreadPoolExecutor(1) as executor:
        for turn in range(3):
            if turn == own_turn:
                task = executor.submit(function)
            while any_rank(accelerator, task is not None and not task.done()):
                time.sleep(seconds)
    return task.result()


def reduce_metrics(
    accelerator, loss: torch.Tensor, norm: torch.Tensor, seconds: float
) -> tuple[float, float, float]:
    """Loss and gradient norm as floats, averaged over all processes, and the main process's time.

    loss, norm: scalars on the CPU.
    seconds: the training time of this process. The time of the main process counts for all, so
    that all processes stop and save at the same step. (It stands still while the caller of the
    main process samples images; the other processes wait.)
    """
    loss, norm = float(loss), float(norm)
    if accelerator.num_processes > 1:
        # The mean of (W · seconds, 0, 0, …) over W processes is the main process's seconds.
        seconds *= accelerator.num_processes * accelerator.is_main_process
        metrics = torch.tensor([loss, norm, seconds], device=accelerator.device)
        loss, norm, seconds = accelerator.reduce(metrics, "mean").tolist()
    return loss, norm, seconds


def gather(accelerator, values: torch.Tensor) -> torch.Tensor:
    """Concatenate the values [B] of all processes, in the order of their ranks; on the CPU."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.gather(values.to(accelerator.device)).cpu()


def warn_on_main_process(accelerator, message: str) -> str:
    """Issue `message` as a warning in the main process, unless it is empty; return it."""
    if message and accelerator.is_main_process:
        warnings.warn(message, stacklevel=3)
    return message
