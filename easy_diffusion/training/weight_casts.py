"""Mixed precision with a single cast of all weights.

torch.autocast casts the weights of a layer to float16 or bfloat16 when the layer is called, and
their gradients back to float32 in the backward pass: two operations for each weight, each of which
takes the CPU tens of µs to start on a GPU. In a network of many small layers these are a fifth of
all operations of a step. `WeightCasts` casts all weights by one operation, and all gradients by
another one. The numbers are those of autocast, bit for bit. The file needs nothing but torch.

>>> layer = torch.nn.Linear(4, 2)
>>> casts = WeightCasts(layer, torch.bfloat16)
>>> with casts.apply(), torch.autocast("cpu", torch.bfloat16):
...     loss = layer(torch.ones(3, 4)).float().sum()
...     layer.weight.dtype
torch.bfloat16
>>> loss.backward()
>>> layer.weight.dtype, layer.weight.grad.dtype
(torch.float32, torch.float32)
"""

import contextlib

import torch
from torch import nn

# The layers whose float32 parameters autocast casts. Other layers are left to autocast.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class CastAll(torch.autograd.Function):
    """Casts tensors to a dtype; in the backward pass, casts their gradients to float32."""

    @staticmethod
    def forward(context, dtype, *tensors):
        context.set_materialize_grads(False)
        return tuple(cast_all(tensors, dtype))

    @staticmethod
    def backward(context, *gradients):
        # A weight that the loss does not depend on has no gradient.
        cast = iter(cast_all([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(cast) for g in gradients)


def cast_all(tensors, dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies of tensors, which may differ in shape, in another dtype."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class WeightCasts:
    """Lets a model compute with copies of its weights in a dtype of lower precision.

    model: a module; only the parameters that it has now and that require a gradient are cast.
    dtype: torch.float16 or torch.bfloat16, that of autocast; torch.float32: nothing is cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.places = [
            (module, name, parameter)
            for module in model.modules()
            if isinstance(module, LAYERS) and dtype != torch.float32
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.dtype == torch.float32
        ]
        self.parameters = list(dict.fromkeys(parameter for _, _, parameter in self.places))

    @contextlib.contextmanager
    def apply(self):
        """Put the copies into the model for the length of a `with` block.

        The backward pass may be inside or after the block; with checkpointing, which calls the
        layers again, it should be inside.
        """
        copies = dict(zip(self.parameters, CastAll.apply(self.dtype, *self.parameters)))
        try:
            for module, name, parameter in self.places:
                module._parameters[name] = copies[parameter]
            yield
        finally:
            for module, name, parameter in self.places:
                module._parameters[name] = parameter
