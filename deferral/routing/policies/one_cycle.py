"""AdamW along one cycle of the learning rate.  torch.optim imports the compiler: seconds that a fit has no use for."""

from collections.abc import Sequence
from math import cos, pi, sqrt

import torch
from torch import Tensor

__all__ = ["OneCycle"]

_RISE = 0.3
_FIRST, _LAST = 1 / 25, 1 / 250_000  # of the largest rate
_MOMENTUM, _LEAST_MOMENTUM = 0.95, 0.85
_SECOND, _EPSILON = 0.999, 1e-8


class OneCycle:
    """`steps` steps whose rate rises to `rate` and falls to nothing, while the momentum falls and rises.

    What torch.optim.AdamW does under OneCycleLR with `total_steps` one more.  Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization" (2019); Smith, "A disciplined approach to neural network hyper-parameters" (2018).
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, steps: int, *, decay: float) -> None:
        self.parameters, self.rate, self.decay = list(parameters), rate, decay
        self._top, self._end = _RISE * (steps + 1) - 1, steps
        self._done = 0
        self._first = [torch.zeros_like(one) for one in self.parameters]
        self._second = [torch.zeros_like(one) for one in self.parameters]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Move the parameters down the gradient of the loss."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, self.parameters)
        rate, momentum = self._setting()
        self._done += 1
        scale = sqrt(1 - _SECOND**self._done)
        for value, gradient, first, second in zip(self.parameters, gradients, self._first, self._second, strict=True):
            first.lerp_(gradient, 1 - momentum)
            second.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
            value.mul_(1 - rate * self.decay)
            value.addcdiv_(first, second.sqrt().div_(scale).add_(_EPSILON), value=-rate / (1 - momentum**self._done))

    def _setting(self) -> tuple[float, float]:
        if self._done <= self._top:
            share = self._done / self._top
            return _between(_FIRST * self.rate, self.rate, share), _between(_MOMENTUM, _LEAST_MOMENTUM, share)
        share = (self._done - self._top) / (self._end - self._top)
        return _between(self.rate, _LAST * self.rate, share), _between(_LEAST_MOMENTUM, _MOMENTUM, share)


def _between(start: float, end: float, share: float) -> float:
    """Along half a cosine."""
    return end + (start - end) / 2 * (1 + cos(pi * share))
