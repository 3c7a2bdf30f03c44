"""Inputs as points of a plane, so that a map of who answers what needs no other library."""

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.validation import require_tensor

__all__ = ["embed_2d"]


@numpy_or_torch
def embed_2d(features: Tensor) -> Tensor:
    """The two principal components of the rows, float64, on the same device.  (N, ...) -> (N, 2)

    Signs are fixed: the largest weight of a component is positive.  A direction without variance is 0.
    """
    require_tensor("features", features)
    if features.dim() < 2 or features.numel() == 0:
        raise ValueError(f"features: expected at least one row and shape (N, d), got {tuple(features.shape)}")
    table = features.detach().flatten(1).double()
    if not bool(table.isfinite().all()):
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    table = table - table.mean(dim=0)
    # The smaller of the two Gram matrices has the same leading eigenvectors, up to a product with the table.
    if table.shape[1] <= table.shape[0]:
        directions = torch.linalg.eigh(table.T @ table).eigenvectors[:, -2:].flip(-1)
    else:
        directions = table.T @ torch.linalg.eigh(table @ table.T).eigenvectors[:, -2:].flip(-1)
        spread = directions.norm(dim=0)
        # Below the rounding of a Gram matrix a direction is noise, and would repeat another one.
        directions = (directions / spread).where(spread > 1e-7 * spread.max(), 0.0)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    components = table @ (directions * largest.sign())
    return torch.nn.functional.pad(components, (0, 2 - components.shape[-1]))
