"""Muon: an optimizer for the matrices of a network.

The gradient of a matrix is dominated by a few directions, and so is Adam's step. Muon gives all
directions nearly the same length. With D = U S Vᵀ, the singular value decomposition of the averaged
gradient D, it steps along U Vᵀ, the orthogonal matrix nearest to D. For a matrix W with r rows and
c columns, its gradient G, momentum M with coefficient μ, learning rate η and weight decay λ:

    M ← μ M + (1 - μ) G
    D = (1 - μ) G + μ M
    W ← (1 - η λ) W - 0.2 η sqrt(max(r, c)) · orthogonalize(D)

(Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The factor
0.2 sqrt(max(r, c)) makes the steps as large as AdamW's: Liu et al., "Muon is scalable for LLM
training", 2025, eq. 4.) No singular values are computed. Starting from X = D / |D|, five steps of

    X ← a X + (b A + c A²) X,   A = X Xᵀ,   (a, b, c) = (3.4445, -4.7750, 2.0315)

bring all singular values to between about 0.7 and 1.2. The weights of a convolution count as a
matrix [C_out, C_in · k · k]. Biases and scales are vectors: leave them to AdamW.

A network has many small matrices, and each operation costs the same time to start, however small
they are. Therefore one operation updates all of them (`torch._foreach_...`), and all matrices of
one shape are orthogonalized as one batch. The orthogonal matrix of Dᵀ is (U Vᵀ)ᵀ, so r×c and c×r
count as one shape. The file needs nothing but torch.

>>> layer = torch.nn.Linear(8, 4)
>>> optimizer = Muon([layer.weight], learning_rate=0.01)
>>> layer(torch.ones(2, 8)).square().sum().backward()
>>> optimizer.step()
>>> torch.linalg.svdvals(orthogonalize(torch.randn(1, 4, 8)))[0].round().tolist()
[1.0, 1.0, 1.0, 1.0]
"""

import math
from collections import defaultdict

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The orthogonal matrices nearest to a batch of matrices, approximately.

    matrices: [N, r, c]; fastest if r <= c.
    steps: number of iterations.

    Returns [N, r, c], with singular values between about 0.7 and 1.2.
    """
    x = matrices.to(iteration_dtype(matrices.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        a = torch.bmm(x, x.mT)                                      # A = X Xᵀ, [N, r, r]
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)      # b A + c A²
        x = torch.baddbmm(x, b, x, beta=3.4445)                     # a X + (b A + c A²) X
    return x.to(matrices.dtype)


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, whose precision is enough here, if the device is fast with it; otherwise float32.

    A GPU needs compute capability 8.0 for that, a CPU AVX-512 bf16 or AMX. On another CPU the
    iteration takes 30 times as long in bfloat16 as in float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions.

    parameters: the parameters to train; ValueError for one with fewer than two dimensions.
    learning_rate: η, as for AdamW.
    momentum: μ.
    weight_decay: λ, as for AdamW.

    The attribute `orthogonalize_all` is the function of this file, or a faster one in its place.
    """

    def __init__(
        self,
        parameters,
        learning_rate: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        defaults = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        self.orthogonalize_all = orthogonalize_all
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(
                        "Muon trains matrices; leave parameters of shape "
                        f"{tuple(parameter.shape)} to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; `closure` is not used."""
        for group in self.param_groups:
            parameters = [weight for weight in group["params"] if weight.grad is not None]
            if not parameters:
                continue
            learning_rate, mu = group["lr"], group["momentum"]
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self._momentum(parameter) for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - mu)            # M ← μ M + (1 - μ) G
            directions = torch._foreach_lerp(gradients, momenta, mu)    # (1 - μ) G + μ M
            updates = self.orthogonalize_all(directions)
            scales = [-learning_rate * 0.2 * max(matrix_shape(p)) ** 0.5 for p in parameters]
            torch._foreach_mul_(updates, scales)
            torch._foreach_mul_(parameters, 1 - learning_rate * group["weight_decay"])
            torch._foreach_add_(parameters, updates)

    def _momentum(self, parameter):
        """The momentum M of a parameter, zero at first."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def matrix_shape(tensor: torch.Tensor) -> tuple[int, int]:
    """The shape (r, c) of a tensor [r, ...] as a matrix."""
    return len(tensor), math.prod(tensor.shape[1:])


def orthogonalize_all(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Orthogonalize tensors [r, ...] as matrices [r, c], all r×c and c×r as one batch.

    Returns tensors of the same shapes and dtypes, contiguous.
    """
    groups = defaultdict(lambda: ([], []))      # (smaller, larger side) → indices of r <= c, r > c
    for i, tensor in enumerate(tensors):
        r, c = matrix_shape(tensor)
        wide, tall = groups[min(r, c), max(r, c)]
        (wide if r <= c else tall).append(i)

    results = [None] * len(tensors)
    for wide, tall in groups.values():
        batch = torch.stack(
            [tensors[i].flatten(1) for i in wide] + [tensors[i].flatten(1).mT for i in tall]
        )
        matrices = orthogonalize(batch)                                 # [N, r, c] with r <= c
        for i, matrix in zip(wide, matrices[:len(wide)]):
            results[i] = matrix.view_as(tensors[i])
        for i, matrix in zip(tall, matrices[len(wide):].mT.contiguous()):
            results[i] = matrix.view_as(tensors[i])
    return results
