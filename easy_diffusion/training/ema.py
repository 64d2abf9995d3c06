"""TODO."""

import torch


@torch.no_grad()
def update_ema(average, models, index: int, ema: float) -> None:
    """The average moves towards the weights, quickly in the first steps."""
    share = 1 - min(ema, (1 + index) / (10 + index))
    torch._foreach_lerp_(list(average.parameters()), [weight.detach() for weight in models.parameters()], share)
