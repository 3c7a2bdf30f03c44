"""Baselines that are hard to beat, as scores (N, A) for `decide` and `fit_offsets`: they belong in every table.

Each is a plug-in rule on what separate models say: a classifier's probabilities, and models of the experts that may be fitted
by any means.  The theory puts the threshold at 0; with estimated probabilities fit it: `fit_offsets(scores, costs, num_own=K)`.
Selective prediction without experts is `chow_scores`.  Values of `probabilities` are read: raw scores are refused.

NumPy or torch in and out.
"""

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.numerics import lift
from deferral.validation import check_costs, check_probabilities, require_batch, require_columns, require_floating

__all__ = ["compare_confidence", "deferral_gains", "post_hoc_scores", "selective_prediction"]


@numpy_or_torch
def selective_prediction(probabilities: Tensor, expected_costs: Tensor) -> Tensor:
    """[p_1 .. p_K, 1 - C_1 .. 1 - C_E]: Chow's rule, to the expert of least mean cost.  (N, K), (E,) -> (N, K+E)

    `expected_costs` are the experts' mean costs over a held-out set, `costs[:, K:].mean(0)`, the same for every row: only the
    classifier's confidence decides whether to ask.  `probabilities` may be the own answer's alone, (N, 1); then num_own = 1.

    Chow, "On Optimum Recognition Error and Reject Tradeoff" (1970); as a baseline of deferral with a tuned threshold: Mozannar
    et al., "Who Should Predict? Exact Algorithms For Learning to Defer to Humans" (AISTATS 2023).
    """
    check_probabilities(probabilities)
    _require_rows("probabilities", probabilities)
    require_floating("expected_costs", expected_costs)
    if expected_costs.dim() != 1:
        raise ValueError(
            f"expected_costs: expected one number per expert (E,), got shape {tuple(expected_costs.shape)}; average over the "
            "held-out rows, or use compare_confidence for costs that depend on the row"
        )
    check_costs(expected_costs, ceiling=None, name="expected_costs")
    return torch.cat([lift(probabilities), (1 - expected_costs).expand(*probabilities.shape[:-1], -1)], dim=-1)


@numpy_or_torch
def compare_confidence(probabilities: Tensor, correctness: Tensor, *, price: Tensor | float = 0.0) -> Tensor:
    """[p_1 .. p_K, q_1 - price_1 .. q_E - price_E]: whoever is more likely right, less the price.  (N, K), (N, E) -> (N, K+E)

    `correctness` are estimates q_j of P(expert j is right | x), from any model fitted to 1[answer_j = target]; `price` is a
    number or one per expert.  `probabilities` may be the own answer's alone, (N, 1); then num_own = 1.

    Raghu et al., "The Algorithmic Automation Problem" (2019); Mozannar et al. (AISTATS 2023).
    """
    check_probabilities(probabilities)
    check_probabilities(correctness, name="correctness")
    _require_rows("probabilities", probabilities)
    _require_rows("correctness", correctness)
    require_batch("probabilities", probabilities.shape[:-1], "correctness", correctness.shape[:-1])
    experts = lift(correctness)
    price = torch.as_tensor(price, dtype=experts.dtype, device=experts.device)
    if price.shape not in ((), correctness.shape[-1:]):
        raise ValueError(f"price: expected a number or one per expert ({correctness.shape[-1]}), got shape {tuple(price.shape)}")
    check_costs(price, ceiling=None, name="price")
    experts = experts - price
    return torch.cat([lift(probabilities), experts.expand(*probabilities.shape[:-1], -1)], dim=-1)


@numpy_or_torch
def deferral_gains(costs: Tensor) -> Tensor:
    """cost_0 - cost_j, what asking expert j instead of the frozen predictor saves on a row.  (N, 1+E) -> (N, E)

    The targets of the regression behind `post_hoc_scores`; fit it on rows that the predictor did not see, and where an answer
    is missing, on the others.
    """
    require_floating("costs", costs)
    if costs.dim() == 0 or costs.shape[-1] < 2:
        raise ValueError(f"costs: expected the own predictor's column and one per expert, got shape {tuple(costs.shape)}")
    return costs[..., :1] - costs[..., 1:]


@numpy_or_torch
def post_hoc_scores(gains: Tensor) -> Tensor:
    """[0, g_1 .. g_E]: ask the expert of largest predicted gain where that is at least 0.  (N, E) -> (N, 1+E)

    `gains` estimate E[cost_0 - cost_j | x], by any regression on `deferral_gains(costs)`; at the true means this is the Bayes
    rule of the frozen predictor.

    Narasimhan et al., "Post-hoc Estimators for Learning to Defer to an Expert" (NeurIPS 2022).
    """
    require_floating("gains", gains)
    require_columns("gains", gains)
    return torch.cat([torch.zeros_like(gains[..., :1]), gains], dim=-1)


def _require_rows(name: str, table: Tensor) -> None:
    if table.dim() < 2:
        raise ValueError(
            f"{name}: expected a column per class or expert, (N, ...), got shape {tuple(table.shape)}; a single column is "
            f"{name}.unsqueeze(-1)"
        )
