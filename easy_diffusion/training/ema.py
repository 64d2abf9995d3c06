"""Exponential moving average (EMA) of the weights: the weights to sample from.

Training changes the weights theta at every step. The averaged weights theta_ema follow them slowly
and give better samples (Ho et al. 2020, appendix B). After step i = 0, 1, 2, …

    d_i        =  min(decay, (1 + i) / (10 + i))
    theta_ema  ←  theta_ema + (1 - d_i) (theta - theta_ema)

With d_i = decay the average extends over about the last 1 / (1 - decay) steps. In the first steps
(1 + i) / (10 + i) is smaller, so that the random initial weights are forgotten quickly. Buffers,
such as the running statistics of BatchNorm, are copied. The file needs nothing but torch.

>>> model = torch.nn.Linear(1, 1, bias=False)
>>> ema_model = torch.nn.Linear(1, 1, bias=False)
>>> _ = torch.nn.init.constant_(model.weight, 10.0)
>>> _ = torch.nn.init.constant_(ema_model.weight, 0.0)
>>> update_ema(ema_model, model, index=0, decay=0.999)
>>> round(ema_model.weight.item(), 4)              # d_0 = 0.1, so 0.9 of the way from 0 to 10
9.0
"""

import torch


class EMA:
    """The moving average of a model's weights, kept in another module of the same kind.

    ema_model, model: modules with the same parameters and buffers in the same order.
    decay: upper limit of d_i, in [0, 1); larger is slower.

    It collects the tensors of both modules once: collecting them takes as long as an update.
    """

    def __init__(self, ema_model, model, decay: float):
        self.decay = decay
        self.ema_parameters = list(ema_model.parameters())
        self.parameters = list(model.parameters())
        self.buffers = list(zip(ema_model.buffers(), model.buffers()))

    @torch.no_grad()
    def update(self, index: int) -> None:
        """Move the averaged weights towards the trained ones and copy the buffers, in place.

        index: the training step i, counted from 0.
        """
        d = min(self.decay, (1 + index) / (10 + index))
        torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - d)
        for ema_buffer, buffer in self.buffers:
            ema_buffer.copy_(buffer)


def update_ema(ema_model, model, index: int, decay: float) -> None:
    """Update the averaged weights of step `index` without an EMA object; arguments as there."""
    EMA(ema_model, model, decay).update(index)
