"""Muon: an optimizer for the matrices of a network.

A gradient of a matrix is dominated by few directions; Adam's step is, too. Muon gives all directions the same length: it
takes the momentum M = U S Vᵀ and steps along U Vᵀ, its nearest orthogonal matrix,

    M ← μ M + (1 - μ) G,    W ← (1 - η λ) W - η 0.2 sqrt(max(rows, columns)) · orthogonal((1 - μ) G + μ M)

(Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the factor 0.2 sqrt(...), which makes its steps
as large as AdamW's: Liu et al., "Muon is scalable for LLM training", 2025, eq. 4.) No singular values are computed: five steps of

    X ← a X + (b A + c A²) X,   A = X Xᵀ,   (a, b, c) = (3.4445, -4.7750, 2.0315),   X = M / |M|

bring them all to about 1. A convolution's weights are taken as a matrix [C_out, C_in · k · k]. Biases and scales are no
matrices: leave those to AdamW. The file needs nothing but torch.

>>> layer = torch.nn.Linear(8, 4)
>>> optimizer = Muon([layer.weight], learning_rate=0.01)
>>> layer(torch.ones(2, 8)).square().sum().backward()
>>> optimizer.step()
>>> torch.linalg.svdvals(orthogonal(torch.randn(1, 4, 8)))[0].round().tolist()
[1.0, 1.0, 1.0, 1.0]
"""

from collections import defaultdict

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrices of a batch [N, R, C], roughly: singular values between 0.7 and 1.2. bfloat16 inside."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT                                                        # [N, R, R], R the smaller side
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Weights of two or more dimensions; ValueError for others. learning_rate and weight_decay as one would for AdamW."""

    def __init__(self, weights, learning_rate: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay})
        flat = [weight.shape for group in self.param_groups for weight in group["params"] if weight.ndim < 2]
        if flat:
            raise ValueError(f"Muon steps matrices; leave weights of shape {tuple(flat[0])} to AdamW")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rate, momentum, alike = group["lr"], group["momentum"], defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.flatten(1).shape].append(weight)
            for (rows, columns), weights in alike.items():                  # matrices of one shape are done together
                updates = []
                for weight in weights:
                    memory = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    memory.lerp_(weight.grad, 1 - momentum)
                    updates.append(weight.grad.lerp(memory, momentum).flatten(1))
                for weight, update in zip(weights, orthogonalize(torch.stack(updates))):
                    weight.mul_(1 - rate * group["weight_decay"])
                    weight.sub_(update.view_as(weight), alpha=rate * 0.2 * max(rows, columns) ** 0.5)
