"""Candidates for a certificate, and what it takes to decide by one."""

import torch
from torch import Tensor

from deferral.certified.risks import check_margin

__all__ = ["threshold_grid", "threshold_offsets"]


def threshold_grid(margin: Tensor, size: int, *, coverage: tuple[float, float] = (0.1, 1.0)) -> Tensor:
    """Rising thresholds that keep evenly spaced shares of some OTHER rows than those to be certified.  (M,) -> (T,)

    Each lies half way between two margins; at most `size`, fewer where margins tie.  A share of 1 is +inf, never deferring.
    A selective risk needs a lowest coverage at which enough rows are kept; see `certify`.
    """
    check_margin(margin)
    if not 0.0 < coverage[0] <= coverage[1] <= 1.0 or size < 1:
        raise ValueError(f"expected size >= 1 and 0 < lowest <= highest coverage <= 1, got {size} and {coverage}")
    levels, sizes = margin.detach().double().cpu().unique(return_counts=True)
    keeps = sizes.cumsum(0).double() / len(margin)
    edges = torch.cat([(levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf])])
    wanted = torch.linspace(*coverage, size, dtype=torch.float64)
    return edges[torch.searchsorted(keeps, wanted - 1e-9).clamp(max=len(edges) - 1)].unique()


def threshold_offsets(threshold: float | Tensor, num_own: int, num_experts: int) -> Tensor:
    """Offsets with which `decide` defers iff `deferral_margin` >= threshold.  float or (N,) -> (A,) or (N, A), float64

    -inf closes the own actions instead of lifting the experts, so that who is the best expert stays the scores' choice.
    """
    value = torch.as_tensor(threshold, dtype=torch.float64)
    if bool(value.isnan().any()):
        raise ValueError("threshold: expected a number or an infinity, got NaN")
    own = torch.zeros_like(value).masked_fill(value == -torch.inf, -torch.inf).unsqueeze(-1)
    experts = (-value).masked_fill(value == -torch.inf, 0.0).unsqueeze(-1)
    return torch.cat([own.expand(*value.shape, num_own), experts.expand(*value.shape, num_experts)], dim=-1)
