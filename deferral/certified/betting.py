"""A p-value for the mean of bounded losses that is small soon where they vary little: by betting against the null hypothesis."""

import math

import numpy as np

from deferral.arrays import tensor_of
from deferral.validation import require_number

__all__ = ["p_value_of_mean"]

_BOLDEST = 0.75


def p_value_of_mean(losses: np.ndarray, at_most: float, *, delta: float = 0.05) -> np.ndarray:
    """How surprising the losses are if their mean exceeded `at_most`.  (..., N) in [0, 1] -> (...,)

    Wealth is multiplied by 1 + bet_i (at_most - loss_i), row after row.  The bet depends on the rows before alone, so that wealth
    is a supermartingale where the mean loss is larger, and 1 / (the most that it ever was) a p-value.  Rows must be in an order
    that was drawn without looking at them.  `delta` is the level at which the bets are best, not one that validity depends on.

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2024), sections 4.1 and 4.4.
    """
    losses = tensor_of("losses", losses).detach().double().cpu().numpy()
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses: expected at least one row, got shape {losses.shape}")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError("losses: expected numbers in [0, 1]")
    require_number("at_most", at_most)
    require_number("delta", delta)
    if not 0 < at_most < 1:
        raise ValueError(f"at_most: expected a level in (0, 1), got {at_most}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a probability in (0, 1), got {delta}")
    count = np.arange(1, losses.shape[-1] + 1)
    mean = (0.5 + losses.cumsum(-1)) / (count + 1)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(-1)) / (count + 1)
    before = np.concatenate([np.full((*losses.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    bet = np.sqrt(2 * math.log(1 / delta) / (losses.shape[-1] * before))
    # The worst loss is 1: the wealth stays positive.
    bet = np.minimum(bet, _BOLDEST / (1 - at_most))
    wealth = np.log1p(bet * (at_most - losses)).cumsum(-1)
    return np.minimum(np.exp(-wealth.max(-1)), 1.0)
