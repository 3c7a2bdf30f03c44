"""Abstention at a constant cost: the cells that score-based and predictor-rejector share, so that neither runs twice.

Single-stage methods train a network of their own, from nothing, on the rows of both stages; two-stage methods and Chow's rule
share one first stage, and the second stage sees the rows that it did not, which Chow's rule does without.  Thresholds are fitted
on the calibration rows.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.harness.cells import Cell
from benchmarks.harness.heads import Head, fit
from benchmarks.harness.images import CLASSES
from benchmarks.harness.judging import Judged, Outputs, fixed, judge
from benchmarks.harness.networks import NETWORKS
from benchmarks.harness.running import Finding, Part, Run, settings_of
from benchmarks.harness.stage1 import FirstStage, Rows, first_stage, recipe_for, rows_by_purpose
from benchmarks.harness.training import outputs_of, train
from deferral.losses import predictor_rejector_abstention, rejector_of_scores, score_based_abstention, two_stage_abstention
from deferral.losses.margin import exponential

__all__ = ["BASELINES", "TABLE", "run_cells"]

TABLE = "abstention"
BASELINES = ("always abstain", "never abstain", "Chow, fitted threshold")
Loss = Callable[[Tensor, Tensor, float], Tensor]


def pair_loss(scores: Tensor, labels: Tensor, cost: float) -> Tensor:
    """Predictor-rejector with mae; the last output is r."""
    return predictor_rejector_abstention(scores[:, :-1], scores[:, -1], labels, cost)


# Each takes K + 1 outputs of a network of its own.
SINGLE_STAGE: dict[str, Loss] = {
    "Mozannar-Sontag (mu=1)": partial(score_based_abstention, mu=1.0),
    "Cao et al. (mu=1.7)": partial(score_based_abstention, mu=1.7),
    "single-stage predictor-rejector (mae)": pair_loss,
}
TWO_STAGE = ("two-stage score-based", "two-stage predictor-rejector")


def run_cells(run: Run, methods: Sequence[str], data_sets: Sequence[str]) -> None:
    """Every open cell of these methods, seed by seed."""
    cells = [
        Cell(TABLE, data, method, f"c={cost:g}", seed, run.preset_name)
        for data in data_sets
        for seed in range(run.seeds)
        for method in methods
        for cost in run.preset.costs[data]
    ]
    stage = cache(partial(first_stage, run))
    images = cache(run.images)

    def work(cell: Cell) -> Finding:
        cost = float(cell.cost.removeprefix("c="))
        first = stage(cell.data, cell.seed)
        references = baselines(first, cost)
        speeds = {"first_stage": first.speed}
        if cell.method in BASELINES:
            judged = references[cell.method]
        elif cell.method in TWO_STAGE:
            judged = two_stage(run, cell, first, cost)
        else:
            outputs, speed = single_stage(run, cell, first, cost, images(cell.data))
            judged = judge(*outputs)
            speeds["speed"] = speed
        return Finding([Part(judged, {name: other for name, other in references.items() if name != cell.method})], speeds)

    run.each(cells, work, lambda cell: settings_of(run, cell.data))


def baselines(first: FirstStage, cost: float) -> dict[str, Judged]:
    """The three that every table has, all from the first stage."""
    always, never, chow = BASELINES
    calibration, test = (_chow(rows, cost) for rows in (first.calibration, first.test))
    return {always: fixed(test, 1), never: fixed(test, 0), chow: judge(calibration, test)}


def two_stage(run: Run, cell: Cell, first: FirstStage, cost: float) -> Judged:
    """The second stage, Phi = exp as published, as a head on what the first stage says.

    Score-based, the class scores are log-probabilities: with them a constant abstain score is Chow's rule.
    """
    rows, inputs = first.stage2, first.stage2.inputs
    head = Head(inputs.unsqueeze(0), 1, hidden=64, seed=cell.seed)

    def rejector(inputs: Tensor, scores: Tensor) -> Tensor:
        value = head(inputs.unsqueeze(0)).squeeze(0)
        if cell.method == "two-stage predictor-rejector":
            return value.squeeze(-1)
        return rejector_of_scores(torch.cat([scores, value], dim=-1))

    def loss(chosen: Tensor) -> Tensor:
        (i,) = chosen
        return two_stage_abstention(rejector(inputs[i], rows.scores[i]), rows.wrong[i], cost, phi=exponential).unsqueeze(0)

    fit([head], loss, 1, len(rows), steps=run.preset.head_steps, seed=cell.seed, learning_rate=1e-3, weight_decay=1.0)

    def outputs(part: Rows) -> Outputs:
        r = rejector(part.inputs, part.scores)
        return _outputs(torch.stack([torch.zeros_like(r), -r], dim=-1), part.wrong, cost)

    return judge(outputs(first.calibration), outputs(first.test))


def single_stage(run: Run, cell: Cell, first: FirstStage, cost: float, images: tuple) -> tuple[tuple[Outputs, Outputs], dict]:
    """A network of its own, trained on the rows of both stages, as many labels as two stages use.

    Chow's rule and never abstaining use fewer: those of the first stage and of calibration.
    """
    train_images, test_images = images
    predictor, stage2, _ = rows_by_purpose(run, len(train_images), cell.seed)
    classes = CLASSES[cell.data]
    loss = SINGLE_STAGE[cell.method]
    started = time.monotonic()
    model, speed = train(
        lambda: NETWORKS[run.preset.network[cell.data]](classes + 1),
        train_images[torch.cat([predictor, stage2]).to(run.device)],
        lambda scores, labels: loss(scores, labels, cost),
        recipe_for(run, cell.data),
        run.results.checkpoint(cell),
        seed=cell.seed,
        watch=run.watch(f"{cell.data}: {cell.method}, c={cost:g}, seed {cell.seed}", run.recipe.epochs),
    )
    pair = loss is pair_loss

    def outputs(source, rows: Rows) -> Outputs:
        chosen = source[rows.numbers.to(run.device)]
        scores = outputs_of(model, chosen.images, bfloat16=run.bfloat16)[1].cpu()
        classes_scores = scores[:, :classes]
        wrong = (classes_scores.argmax(dim=-1) != rows.labels).float()
        best = classes_scores.amax(dim=-1)
        keep_and_abstain = [torch.zeros_like(best), -scores[:, classes]] if pair else [best, scores[:, classes]]
        return _outputs(torch.stack(keep_and_abstain, dim=-1), wrong, cost)

    both = outputs(train_images, first.calibration), outputs(test_images, first.test)
    return both, {**speed, "seconds": round(time.monotonic() - started, 2)}


def _chow(rows: Rows, cost: float) -> Outputs:
    confidence = rows.scores.exp().amax(dim=-1)
    return _outputs(torch.stack([confidence, torch.full_like(confidence, 1 - cost)], dim=-1), rows.wrong, cost)


def _outputs(scores: Tensor, wrong: Tensor, cost: float) -> Outputs:
    return Outputs(scores, torch.stack([wrong, torch.full_like(wrong, cost)], dim=-1))
