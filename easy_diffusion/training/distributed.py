"""TODO."""

import warnings

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast


def fast_precision() -> str:
    """What accelerate calls mixed_precision: "bf16" where this machine computes bfloat16 in hardware, else "no"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    has = [getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return "bf16" if any(has) else "no"


def default_accelerator() -> Accelerator:
    """An Accelerator of the fast precision; where this process has made one before, of that one's: it has only one."""
    return Accelerator(mixed_precision=None if AcceleratorState._shared_state else fast_precision())


def check_same_step(accelerator, path, index: int) -> None:
    """Whether all processes go on at the same step; if not, ValueError."""
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.tensor(index, device=accelerator.device), "sum")
        if any_rank(accelerator, int(total) != index * accelerator.num_processes):
            raise ValueError(f"this process goes on from step {index}, others from another: {path} must lie on a disk that all of them see")


def broadcast_parameters(accelerator, modules) -> None:
    """All processes take the first one's numbers."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for tensor in modules.state_dict().values():
                tensor.copy_(broadcast(tensor))


def average_gradients(accelerator, weights) -> None:
    """Each gradient becomes the mean over all processes, in one message. That comes after all of them have been computed, so that a process
    which runs out of memory on the way can say so before the others wait for it."""
    if accelerator.num_processes > 1:
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for weight, part in zip(weights, mean.split([weight.numel() for weight in weights])):
            weight.grad = part.view_as(weight)


def any_rank(accelerator, true: bool) -> bool:
    """Whether it is true in any process."""
    if accelerator.num_processes == 1:
        return true
    return bool(accelerator.reduce(torch.tensor(float(true), device=accelerator.device), "sum"))


def reduce_metrics(accelerator, loss: torch.Tensor, norm: torch.Tensor, seconds: float) -> tuple[float, float, float]:
    """Loss and gradient's length as numbers, the mean over all processes, and the first one's clock, so that all of them decide alike.
    (While the first one's caller looks at samples its clock stands; the others wait.)"""
    loss, norm = torch.stack([loss.float(), norm.float()]).tolist()
    if accelerator.num_processes > 1:
        seconds *= accelerator.num_processes * accelerator.is_main_process
        loss, norm, seconds = accelerator.reduce(torch.tensor([loss, norm, seconds], device=accelerator.device), "mean").tolist()
    return loss, norm, seconds


def warn_on_main_process(accelerator, sentence: str) -> str:
    """The sentence, which the first process also says as a warning."""
    if sentence and accelerator.is_main_process:
        warnings.warn(sentence, stacklevel=3)
    return sentence


def autocast(device):
    """bfloat16 for sampling, where this machine computes in it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_precision() == "bf16")
