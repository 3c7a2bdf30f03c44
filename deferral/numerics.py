"""Numbers in one place: half precision is lifted, exponentials continue linearly, and values are read where that is free."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "KNEE",
    "LEAST_BEFORE_KNEE",
    "PRECISE",
    "cast_like",
    "exp_linear",
    "expm1_linear",
    "lift",
    "log_add_exp",
    "readable",
    "transformed",
]

# e^10 = 2.2e4 fits float16, and rows past it still pull with a constant, finite slope.
KNEE = 10.0
# A probability of float32 has all its digits down to here.
PRECISE = 1e-35
# The probability at which 1/p meets its tangent.
LEAST_BEFORE_KNEE = math.exp(-KNEE)


_HALF = (torch.float16, torch.bfloat16)


def lift(scores: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return scores.float() if scores.dtype in _HALF else scores


def cast_like(value: Tensor | float, scores: Tensor) -> Tensor:
    """The value in the dtype of the lifted scores.  One number comes to their device as well, as in torch's own operations."""
    dtype = torch.float32 if scores.dtype in _HALF else scores.dtype
    if not isinstance(value, Tensor):
        # Added, and not filled in: a compiler would take every new number for a new program.
        return torch.zeros((), dtype=dtype, device=scores.device) + value
    return value.to(dtype) if value.dim() else value.to(scores.device, dtype)


def exp_linear(t: Tensor) -> Tensor:
    """exp(t) up to the knee, its tangent beyond: finite and with a non-zero slope for every finite t.

    A clamp would have zero gradient exactly on the rows that are most wrong.
    """
    return torch.exp(t.clamp(max=KNEE)) + math.exp(KNEE) * torch.relu(t - KNEE)


def expm1_linear(t: Tensor) -> Tensor:
    """exp(t) - 1, accurate near 0, with the same tangent beyond the knee."""
    return torch.expm1(t.clamp(max=KNEE)) + math.exp(KNEE) * torch.relu(t - KNEE)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with a second derivative however far apart they lie: that of `torch.logaddexp` is then NaN."""
    return torch.stack(torch.broadcast_tensors(a, b)).logsumexp(dim=0)


def transformed() -> bool:
    """Whether `torch.func` is at work, vmap, grad or one of their relatives, or derivatives are taken forwards."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def readable(tensor: Tensor) -> bool:
    """Whether a look at the values waits for nobody and breaks no graph: a plain tensor on a CPU that nothing traces."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transformed()
        and not torch._C._len_torch_dispatch_stack()
    )
