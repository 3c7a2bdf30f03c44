"""The rules that are hard to beat, on the outputs in a file: compare-confidence, selective prediction, post-hoc deferral."""

import torch
from torch import Tensor

from deferral.baselines import compare_confidence, deferral_gains, post_hoc_scores
from deferral.evaluation.outputs import Outputs
from deferral.metrics import average

__all__ = ["baselines"]


def baselines(
    output: Outputs, costs: Tensor, prices: list[float], abstain_cost: float | None, fitting: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores (N, A) and the rows for their threshold, by name: compare-confidence where the file has the probabilities.

    The others where there are rows to learn from; post-hoc deferral learns on one half of them and has its threshold from the
    other.  None where there is nobody to hand a row to.
    """
    asked = 1 + len(prices)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if output.mask.shape[-1] == 1:
        return found
    probabilities = output.probabilities
    own_known = probabilities is not None and not bool(probabilities[:, 0].isnan().any())
    all_known = probabilities is not None and not bool((probabilities.isnan() & output.mask[:, :asked]).any())
    if probabilities is not None and all_known and prices and output.labels is not None:
        own, right = probabilities[:, :1], probabilities[:, 1:].nan_to_num(0.0)
        scores = compare_confidence(own, right, price=torch.tensor(prices, dtype=torch.float64))
        abstain = [torch.full_like(own, 1 - abstain_cost)] if output.abstains and abstain_cost is not None else []
        found["compare-confidence"] = torch.cat([scores, *abstain], dim=-1), fitting
    if len(fitting) < 2:
        return found
    confidence = probabilities[:, :1] if probabilities is not None and own_known else None
    if confidence is None and output.scores is not None:
        confidence = output.scores[:, :1]
    if confidence is not None:
        # An expert who answered none of these rows is never asked.
        means = average(costs[fitting].where(output.mask[fitting], torch.nan))[1:].nan_to_num(torch.inf)
        # The threshold is fitted, so that a score in place of a probability will do.
        found["selective prediction"] = torch.cat([confidence, (1 - means).expand(len(confidence), -1)], dim=-1), fitting
    features = _features(output)
    if features is not None:
        learning, thresholding = fitting.tensor_split(2)
        gains = _regressed_gains(features, costs, output.mask, learning)
        found["post-hoc deferral"] = post_hoc_scores(gains), thresholding
    return found


def _features(output: Outputs) -> Tensor | None:
    """Scores and probabilities, standardised over the rows that have them, 0 elsewhere, and a constant."""
    columns = [table for table in (output.scores, output.probabilities) if table is not None]
    if not columns:
        return None
    table = torch.cat(columns, dim=-1)
    table = table.where(table.isfinite(), torch.nan)
    mean = table.nanmean(dim=0)
    deviation = (table - mean).square().nanmean(dim=0).sqrt()
    z = ((table - mean) / deviation).where(deviation > 1e-9 * mean.abs() + 1e-300, 0.0).nan_to_num(0.0)
    return torch.cat([z, torch.ones_like(z[:, :1])], dim=-1)


def _regressed_gains(features: Tensor, costs: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """What asking each expert (or abstaining) saves, by least squares with a small ridge on the rows that know it.  (N, A-1)"""
    gains = deferral_gains(costs)
    ridge = torch.eye(features.shape[-1], dtype=torch.float64)
    predicted = []
    for action in range(gains.shape[-1]):
        known = rows[mask[rows, 1 + action]]
        x, y = features[known], gains[known, action]
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        predicted.append(features @ weights if len(known) else torch.full_like(features[:, 0], -torch.inf))
    return torch.stack(predicted, dim=-1)
