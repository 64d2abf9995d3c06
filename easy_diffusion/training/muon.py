"""Muon: an optimizer for the matrices of a network.

The gradient of a matrix is dominated by a few directions, and so is Adam's step. Muon gives all
directions the same length. With the momentum M = U S Vᵀ (singular value decomposition), it steps
along U Vᵀ, the orthogonal matrix nearest to M. For a matrix W with r rows and c columns, its
gradient G, momentum coefficient μ, learning rate η and weight decay λ:

    M ← μ M + (1 - μ) G
    W ← (1 - η λ) W - 0.2 η sqrt(max(r, c)) · orthogonalize((1 - μ) G + μ M)

(Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The factor
0.2 sqrt(max(r, c)) makes the steps as large as AdamW's: Liu et al., "Muon is scalable for LLM
training", 2025, eq. 4.) No singular values are computed. Starting from X = M / |M|, five steps of

    X ← a X + (b A + c A²) X,   A = X Xᵀ,   (a, b, c) = (3.4445, -4.7750, 2.0315)

bring all singular values close to 1. The weights of a convolution count as a matrix
[C_out, C_in · k · k]. Biases and scales are vectors: leave them to AdamW. The file needs nothing
but torch.

>>> layer = torch.nn.Linear(8, 4)
>>> optimizer = Muon([layer.weight], learning_rate=0.01)
>>> layer(torch.ones(2, 8)).square().sum().backward()
>>> optimizer.step()
>>> torch.linalg.svdvals(orthogonalize(torch.randn(1, 4, 8)))[0].round().tolist()
[1.0, 1.0, 1.0, 1.0]
"""

from collections import defaultdict

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The orthogonal matrices nearest to a batch of matrices, approximately.

    matrices: [N, r, c]; computed in bfloat16.
    steps: number of iterations.

    Returns [N, r, c], with singular values between about 0.7 and 1.2.
    """
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT                            # so that X Xᵀ has the smaller side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT                        # [N, min(r, c), min(r, c)]
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if is_tall:
        x = x.mT
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions.

    parameters: the parameters to train; ValueError for one with fewer than two dimensions.
    learning_rate: η, as for AdamW.
    momentum: μ.
    weight_decay: λ, as for AdamW.
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
            parameters_by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = parameter.flatten(1).shape      # (r, c)
                    parameters_by_shape[shape].append(parameter)
            for shape, parameters in parameters_by_shape.items():
                self._step_same_shape(group, shape, parameters)

    def _step_same_shape(self, group, shape, parameters):
        """Update parameters that are matrices of one shape (r, c), as one batch."""
        learning_rate = group["lr"]
        mu = group["momentum"]
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            momentum = state.setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 1 - mu)                          # μ M + (1 - μ) G
            directions.append(parameter.grad.lerp(momentum, mu).flatten(1))   # (1 - μ) G + μ M
        updates = orthogonalize(torch.stack(directions))                    # [N, r, c]
        scale = learning_rate * 0.2 * max(shape) ** 0.5
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - learning_rate * group["weight_decay"])
            parameter.sub_(update.view_as(parameter), alpha=scale)
