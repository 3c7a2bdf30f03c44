"""Judge the outputs of any tool: methods with intervals and paired differences, baselines, areas, calibration of experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deferral.calibration import fit_offsets
from deferral.costs import error_costs, squared_costs
from deferral.curves import (
    Curve,
    augrc,
    aurc,
    cost_coverage_curve,
    excess_aurc,
    excess_system_aurc,
    own_and_asked,
    risk_coverage_curve,
    system_aurc,
)
from deferral.decision import decide, margin_levels, oracle
from deferral.errors import DataError
from deferral.evaluation.baselines import baselines
from deferral.evaluation.belonging import check_files, rows_of
from deferral.evaluation.comparison import GRID, MODEL, RESAMPLES, Comparison, Method, System
from deferral.evaluation.outputs import Outputs, read_outputs
from deferral.intervals import Interval, bootstrap, mean_interval, metric_interval
from deferral.reliability import brier, calibration_error, debiased_calibration_error
from deferral.validation import require_level

__all__ = ["Evaluation", "evaluate"]

# On fewer, a percentile interval of a mean covers it clearly less often than it says.
_FEW_ROWS = 30


@dataclass(frozen=True)
class Evaluation:
    """Everything that is known about some methods on the same rows."""

    comparison: Comparison
    rows: Tensor  # (N,), those of the files that judge, from 0
    areas: dict[str, dict[str, Interval]]  # method: figure: interval
    risk: dict[str, tuple[Curve, Tensor, Tensor]]  # method: risk-coverage curve, low and high ends on GRID
    cost: dict[str, tuple[Tensor, Tensor]]  # method: low and high ends of its cost-coverage curve on GRID
    calibration: dict[str, dict[str, Interval]]  # who answers: figure: interval
    probabilities: dict[str, tuple[Tensor, Tensor]]  # who answers: P(right) and whether right, on the rows that have both


def evaluate(
    paths: Sequence[Path],
    *,
    prices: Mapping[str, float] | None = None,
    abstain_cost: float | None = None,
    calibration_share: float = 0.0,
    seed: int = 0,
    regression: bool = False,
    level: float = 0.95,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> Evaluation:
    """Read one file per method (see `read_outputs`), all on the same rows, and judge them; the first is the reference.

    `prices`: what asking an expert costs, in units of one error (of squared error in regression).  With a
    `calibration_share`, that share of the rows, drawn at random, fits one threshold per method, and the others judge it.
    `level` is that of all intervals.
    DataError where the files do not belong together or the costs do not fit them.  `on_stage` is told what is being worked on:
    intervals of a hundred thousand rows take minutes.
    """
    require_level(level)
    on_stage("reading")
    outputs = [read_outputs(path, regression=regression) for path in paths]
    first = outputs[0]
    prices = dict(prices or {})
    check_files(outputs, paths, prices, abstain_cost, calibration_share)
    rows = torch.randperm(len(first.targets), generator=torch.Generator().manual_seed(seed))
    fitting, judging = rows.tensor_split([rows_of(calibration_share, len(rows))])
    judging = judging.sort().values
    price_row = [prices.get(name, 0.0) for name in first.experts]
    files = _Files(outputs, [_costs(output, price_row, abstain_cost) for output in outputs], fitting, judging)
    methods, of_file = _methods(files, price_row, abstain_cost)
    areas, risk, cost = {}, {}, {}
    for number, output in enumerate(outputs):
        if output.scores is not None:
            on_stage(f"{output.name}: areas and curves (file {number + 1} of {len(outputs)})")
            areas[output.name], risk[output.name], band = _judged_curves(output.scores[judging], files.system(number), level)
            if band is not None:
                cost[of_file[output.name]] = band
    on_stage("calibration of the probabilities")
    calibration, probabilities = _reliability(first, judging, level)
    comparison = Comparison(
        name=first.name,
        title=f"{', '.join(path.name for path in paths)}: {len(judging)} rows"
        + (f", thresholds fitted on {len(fitting)} others" if len(fitting) else ""),
        reference=of_file[first.name],
        methods=methods,
        experts=first.experts,
        classes=first.labels or [],
        targets=first.targets[judging],
        settings={
            "files": [path.name for path in paths],
            "prices": prices,
            "abstain_cost": abstain_cost,
            "calibration_share": calibration_share,
            "seed": seed,
            "level": level,
        },
        notes=[*_notes(first, len(judging)), *_unread(outputs, paths)],
        level=level,
    )
    return Evaluation(comparison, judging, areas, risk, cost, calibration, probabilities)


@dataclass(frozen=True)
class _Files:
    """The outputs of each file, their costs, and the rows by which thresholds are fitted and methods judged."""

    outputs: list[Outputs]
    costs: list[Tensor]  # (N, A) each
    fitting: Tensor
    judging: Tensor

    def system(self, number: int) -> System:
        output, rows = self.outputs[number], self.judging
        return System(
            self.costs[number][rows], output.answers[rows], output.targets[rows], len(output.experts), output.mask[rows]
        )

    def take(self, name: str, number: int, scores: Tensor | None, actions: Tensor) -> Method:
        curve = None if scores is None or scores.shape[-1] == 1 else scores[self.judging]
        return self.system(number).take(name, actions[self.judging], curve)

    def fitted(self, name: str, number: int, scores: Tensor, rows: Tensor) -> Method:
        """With a threshold from those rows, where there are any."""
        mask = self.outputs[number].mask
        if len(rows):
            scores = scores + fit_offsets(scores[rows], self.costs[number][rows], mask=mask[rows], num_own=1)
        return self.take(name, number, scores, decide(scores, mask=mask))


def _methods(files: _Files, prices: list[float], abstain_cost: float | None) -> tuple[list[Method], dict[str, str]]:
    """Every file as it is and with a threshold of the fitting rows, the baselines, and the method that stands for each file."""
    methods, of_file = [], {}
    for number, output in enumerate(files.outputs):
        again = bool(len(files.fitting)) and output.scores is not None and output.scores.shape[-1] > 1
        # One curve per file: it is the same for every threshold.
        methods.append(files.take(output.name, number, None if again else output.scores, output.actions))
        if again and output.scores is not None:
            methods.append(files.fitted(f"{output.name}, threshold fitted", number, output.scores, files.fitting))
        of_file[output.name] = methods[-1].name
    first, judged = files.outputs[0], files.system(0)
    for name, (scores, of_threshold) in baselines(first, files.costs[0], prices, abstain_cost, files.fitting).items():
        methods.append(files.fitted(name, 0, scores, of_threshold))
    methods.append(judged.always("never deferring", 0))
    for place, name in enumerate(first.experts, start=1):
        answered = len(judged.costs) if judged.mask is None else int(judged.mask[:, place].sum())
        # Who answered none of these rows has no figure, and who answered some is not to be compared with those who had all.
        only = "" if answered == len(judged.costs) else f", only its {answered} rows"
        methods += [judged.always(f"always {name}{only}", place)] if answered else []
    if first.abstains:
        methods.append(judged.always("always abstaining", judged.costs.shape[-1] - 1))
    methods.append(judged.take("oracle", oracle(judged.costs, mask=judged.mask)))
    names = [method.name for method in methods]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"two methods would be called {min(repeated)!r}; a method is called like its file: rename the file")
    return methods, of_file


def _notes(output: Outputs, rows: int) -> list[str]:
    notes = [] if output.labels else ["Costs are squared errors in the unit of the targets; there is no accuracy."]
    if rows < _FEW_ROWS:
        notes.append(f"{rows} rows are few: the intervals are too short.")
    return notes


def _unread(outputs: list[Outputs], paths: Sequence[Path]) -> list[str]:
    notes = []
    for output, path in zip(outputs, paths, strict=True):
        if output.ignored:
            names = [*output.ignored[:5], *([f"{len(output.ignored) - 5} more"] if len(output.ignored) > 5 else [])]
            notes.append(f"{path.name}: columns that are not read: {', '.join(names)}.")
    return notes


def _costs(output: Outputs, prices: list[float], abstain_cost: float | None) -> Tensor:
    asked = 1 + len(prices)
    answers = output.answers[:, :asked]
    if output.labels is None:
        costs = squared_costs(answers, output.targets, price=[0.0, *prices])
    else:
        errors, _ = error_costs(answers, output.targets, missing=-1)
        # In float64: a price that float32 has rounded would no longer tie with an equal cost of abstaining.
        costs = errors.double() + torch.tensor([0.0, *prices], dtype=torch.float64)
    if output.abstains and abstain_cost is not None:
        costs = torch.cat([costs, torch.full_like(costs[:, :1], abstain_cost)], dim=-1)
    return costs


def _doubt(scores: Tensor) -> Tensor:
    """The best expert's score less the own one: who answered a row says nothing of how sure the model is there.  (N, A) -> (N,)

    Where no expert has a score, the median of the others' best stands for it.
    """
    best = scores[:, 1:].amax(-1)
    scored = best.isfinite()
    stand_in = best[scored].median() if bool(scored.any()) else best.new_zeros(())
    return best.where(scored, stand_in) - scores[:, 0]


def _judged_curves(
    scores: Tensor, system: System, level: float
) -> tuple[dict[str, Interval], tuple[Curve, Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Areas with intervals, the risk-coverage curve with its ends on GRID, and the ends of the cost-coverage curve."""
    deferring = scores.shape[-1] > 1
    if deferring:
        margin, own, asked = own_and_asked(scores, system.costs, mask=system.mask, num_own=1)
        doubt = _doubt(scores.double())
    else:
        margin = doubt = -scores[:, 0]
        own = asked = system.costs[:, 0]

    # Ranks, so that margins that rounding alone tells apart are ties here too.
    confidence = margin_levels(doubt).double()

    def figure(metric: Callable[[Tensor], Tensor]) -> Interval:
        return metric_interval(metric, len(own), level=level, resamples=RESAMPLES)

    def band(metric: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        curves = bootstrap(metric, len(own), resamples=RESAMPLES)
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.nanquantile(curves, ends, dim=0)
        return low, high

    areas = {
        "AURC": figure(lambda weights: aurc(confidence, own, weights)),
        "excess AURC": figure(lambda weights: excess_aurc(confidence, own, weights)),
        "AUGRC": figure(lambda weights: augrc(confidence, own, weights)),
    }
    if deferring:
        areas["system AURC"] = figure(lambda weights: system_aurc(margin, own, asked, weights))
    if deferring and not bool(asked.isnan().any()):
        areas["excess system AURC"] = figure(lambda weights: excess_system_aurc(margin, own, asked, weights))
    risk = risk_coverage_curve(confidence, own), *band(lambda weights: risk_coverage_curve(confidence, own, weights).at(GRID))
    cost = band(lambda weights: cost_coverage_curve(margin, own, asked, weights).at(GRID)) if deferring else None
    return areas, risk, cost


def _reliability(
    output: Outputs, judging: Tensor, level: float
) -> tuple[dict[str, dict[str, Interval]], dict[str, tuple[Tensor, Tensor]]]:
    if output.probabilities is None or output.labels is None:
        return {}, {}
    figures, rows = {}, {}
    for column, name in enumerate([MODEL, *output.experts]):
        probability, known = output.probabilities[judging, column], output.mask[judging, column]
        usable = known & ~probability.isnan()
        if int(usable.sum()) < 2:
            continue
        probability = probability[usable]
        right = (output.answers[judging, column] == output.targets[judging])[usable].double()
        rows[name] = (probability, right)
        bins = max(1, min(15, len(right) // 10))
        figures[name] = {
            # No percentile of its resamples is the end of an interval: they are all too large.
            "ECE": Interval(float(calibration_error(probability, right, bins=bins)), torch.nan, torch.nan),
            "debiased squared error": _debiased(probability, right, bins, level),
            "Brier": mean_interval(brier(probability, right), level=level, resamples=RESAMPLES),
        }
    return figures, rows


def _debiased(probability: Tensor, right: Tensor, bins: int, level: float) -> Interval:
    def metric(weights: Tensor) -> Tensor:
        return debiased_calibration_error(probability, right, weights, bins=bins)

    return metric_interval(metric, len(right), level=level, resamples=RESAMPLES, centred=True)
