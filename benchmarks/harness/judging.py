"""From scores and costs to the figures of a cell: natural and fitted threshold, intervals, differences on the same rows.

Whatever the method, it is judged over 1 + E actions: keep the own answer, or ask (abstain) one of E.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cells import NotFinite
from deferral.calibration import fit_offsets
from deferral.decision import decide
from deferral.intervals import Interval, bootstrap_means, interval
from deferral.metrics import deferral_cost, kept, load

__all__ = ["Judged", "Outputs", "figures", "fixed", "judge", "single_stage"]

RESAMPLES = 2000


@dataclass(frozen=True)
class Outputs:
    """Some rows: scores (N, 1+E), what each action costs (N, 1+E), and its errors where the costs hold prices."""

    scores: Tensor
    costs: Tensor
    errors: Tensor | None = None


@dataclass(frozen=True)
class Judged:
    """What a method does on the test rows, one value a row."""

    cost: Tensor
    natural_cost: Tensor
    kept: Tensor
    natural_kept: Tensor
    own_cost: Tensor
    load: Tensor  # (N, E)
    error: Tensor | None = None

    def mean_over(self, rows: Tensor, count: int) -> "Judged":
        """Rows that occur several times (in several splits) averaged.  `rows` are their numbers below `count`."""

        def averaged(values: Tensor) -> Tensor:
            sums = torch.zeros(count, *values.shape[1:], dtype=torch.float64).index_add(0, rows, values.double())
            times = torch.bincount(rows, minlength=count)
            return (sums / times.clamp(min=1).view(-1, *[1] * (values.dim() - 1)))[times > 0]

        weighted = {"own_cost": averaged(self.own_cost * self.kept) / averaged(self.kept).clamp(min=1e-12)}
        plain = {name: averaged(value) for name, value in vars(self).items() if value is not None and name != "own_cost"}
        return Judged(**plain, **weighted)


def single_stage(scores: Tensor, targets: Tensor, num_classes: int, expert_costs: Tensor) -> Outputs:
    """K + E scores as 1 + E: the best class stands for the own answer.  (N, K+E), (N,), K, (N, E) -> Outputs"""
    classes = scores[:, :num_classes]
    wrong = (decide(classes) != targets).to(expert_costs.dtype)
    table = torch.cat([classes.amax(dim=-1, keepdim=True), scores[:, num_classes:]], dim=-1)
    return Outputs(table.cpu(), torch.cat([wrong.unsqueeze(-1), expert_costs], dim=-1).cpu())


def judge(calibration: Outputs, test: Outputs, *, errors_ahead: float = 0.0) -> Judged:
    """Fit the threshold on the calibration rows, decide the test rows with it, and without it.

    Where its gain on the calibration rows is below `errors_ahead` standard errors the natural threshold stays: few rows fit
    their noise.
    """
    scores = calibration.scores.double()
    offsets = fit_offsets(scores, calibration.costs.double(), num_own=1)
    gain = deferral_cost(calibration.costs, decide(scores)) - deferral_cost(calibration.costs, decide(scores, offsets))
    if gain.mean() < errors_ahead * gain.std() / len(gain) ** 0.5:
        offsets = torch.zeros_like(offsets)
    return _taken(test, decide(test.scores.double(), offsets), decide(test.scores.double()))


def fixed(test: Outputs, action: int | Tensor) -> Judged:
    """The same action on every row, or for each the given one (N,)."""
    actions = torch.as_tensor(action).expand(len(test.costs))
    return _taken(test, actions, actions)


def figures(judged: Judged, references: Mapping[str, Judged]) -> dict[str, Any]:
    """Means with their 95% bootstrap intervals, and the cost minus that of each reference, paired over the rows.

    NotFinite where a row has none.
    """
    columns = {
        "cost": judged.cost,
        "natural_cost": judged.natural_cost,
        "coverage": judged.kept,
        "natural_coverage": judged.natural_kept,
        "_kept_cost": judged.own_cost * judged.kept,
    }
    if judged.error is not None:
        columns["error"] = judged.error
    columns |= {f"minus {name}": judged.cost - other.cost for name, other in references.items()}
    table = torch.stack([column.double() for column in columns.values()], dim=-1)
    if not bool(table.isfinite().all()):
        names = [
            name.lstrip("_") for name, finite in zip(columns, table.isfinite().all(dim=0).tolist(), strict=True) if not finite
        ]
        raise NotFinite(f"expected finite figures on every test row, not so: {', '.join(names)}")
    resampled = bootstrap_means(table, resamples=RESAMPLES)
    means = dict(zip(columns, table.mean(dim=0).tolist(), strict=True))
    samples = dict(zip(columns, resampled.unbind(dim=-1), strict=True))
    found = {name: _rounded(interval(means[name], samples[name])) for name in columns if not name.startswith(("_", "minus "))}
    # Where (nearly) nothing is kept, the cost of what is kept has no interval.
    if bool((samples["coverage"] > 0).all()):
        accepted = interval(means["_kept_cost"] / means["coverage"], samples["_kept_cost"] / samples["coverage"])
        found["accepted_cost"] = _rounded(accepted)
    differences = {name: _rounded(interval(means[f"minus {name}"], samples[f"minus {name}"])) for name in references}
    shares = [round(share, 6) for share in judged.load.double().mean(dim=0).tolist()]
    return {**found, "load": shares, "difference": differences}


def _taken(test: Outputs, actions: Tensor, natural: Tensor) -> Judged:
    return Judged(
        cost=deferral_cost(test.costs, actions),
        natural_cost=deferral_cost(test.costs, natural),
        kept=kept(actions, num_own=1),
        natural_kept=kept(natural, num_own=1),
        own_cost=test.costs[:, 0],
        load=load(actions, num_own=1, num_experts=test.costs.shape[-1] - 1),
        error=None if test.errors is None else deferral_cost(test.errors, actions),
    )


def _rounded(value: Interval) -> dict[str, float]:
    return {name: round(number, 5) for name, number in vars(value).items()}
