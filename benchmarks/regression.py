"""Regression that may ask experts, or abstain, on eight UCI sets.  python -m benchmarks regression

Claim: learned deferral costs less than never deferring and than always deferring, single and two stages (Mao, Mohri, Zhong,
"Regression with Multi-Expert Deferral", ICML 2024).  Published figures: not available to us.

Fixed before any result was seen.  20 splits of every set: half of the rows train the predictor (32 hidden units, squared loss)
and the experts, 20% the second stage, 10% the thresholds, 20% are the test.  Expert j is gradient boosting on one third of the
training rows, the j-th by the first principal component.  Costs are squared errors on standardised y, plus beta = 0, 0.05, 0.1
for experts 1, 2, 3; abstaining costs 0.1.  The single stage starts from the fitted predictor and learns both on the rows of the
second stage, where the experts' costs are honest.  All 20 splits are trained at once along a leading dimension.

Baselines: never and always (the expert that is cheapest on the calibration rows), a variance threshold (Chow's rule for
regression: the predictor's loss is learned, and the cheapest expert asked above a threshold), no-rejection learning (Li et al.
2023: the predictor learns from the rows of both stages, and nearest calibration rows estimate its loss), post-hoc deferral (the
cost of every action is regressed).  Intervals are over rows, each averaged over the splits that test it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.cells import Cell, write_whole
from benchmarks.harness.heads import Head, at, fit
from benchmarks.harness.judging import Judged, Outputs, fixed, judge
from benchmarks.harness.running import Finding, Part, Run, options, running
from deferral.datasets import uci
from deferral.losses import learned_loss, regression_abstention, regression_deferral

TABLE = "regression"
DATA = {
    "airfoil": "airfoil_self_noise",
    "concrete": "concrete_strength",
    "boston": "boston_housing",
    "energy": "energy_efficiency",
    "yacht": "yacht_hydrodynamics",
    "wine": "wine_quality_red",
    "abalone": "abalone",
    "power plant": "power_plant",
}
BETAS = (0.0, 0.05, 0.1)
ABSTENTION = "abstain at 0.1"
COSTS = ("1 expert", "2 experts", "3 experts", ABSTENTION)
SPLITS = 20
STEPS = {"laptop": 3000, "tiny": 20}  # of every head
SHARES = (0.5, 0.2, 0.1, 0.2)  # training, stage 2, calibration, test
NEVER, ALWAYS, VARIANCE = "never defer", "always defer", "variance threshold"
METHODS = (NEVER, ALWAYS, VARIANCE, "no-rejection learning", "post-hoc", "two-stage", "single-stage")


@dataclass(frozen=True)
class Columns:
    """Rows of one purpose in every split: their numbers (S, N), inputs (S, N, D), standardised targets, experts (S, N, 3)."""

    numbers: Tensor
    x: Tensor
    y: Tensor
    experts: Tensor

    def with_own(self, own: Tensor, costs: str) -> Tensor:
        """What each action costs: own squared error first.  (S, N, 1 + E)"""
        own_cost = (own - self.y).square().unsqueeze(-1)
        if costs == ABSTENTION:
            return torch.cat([own_cost, torch.full_like(own_cost, 0.1)], dim=-1)
        number = int(costs.split()[0])
        squared = (self.experts[..., :number] - self.y.unsqueeze(-1)).square()
        return torch.cat([own_cost, squared + torch.tensor(BETAS[:number])], dim=-1)


@dataclass(frozen=True)
class Problem:
    """A data set in 20 splits, with the predictor trained on the training rows and the one trained on both stages' rows."""

    rows: int
    train: Columns
    stage2: Columns
    calibration: Columns
    test: Columns
    steps: int

    @staticmethod
    def read(run: Run, data: str, steps: int) -> "Problem":
        """The splits of a data set; the experts' answers are kept in the work folder, because boosting takes the longest."""
        table = uci(run.data_root / "uci", DATA[data])
        features, target = table.features.numpy(), table.targets.numpy()
        path = run.results.work / f"regression-{DATA[data]}-{SPLITS}-splits-{SHARES[0]}-experts.npy"
        with run.results.claim(f"regression-{data}-experts", wait=True):
            if not path.is_file():
                with write_whole(path) as partial_path:
                    np.save(partial_path, np.stack([_experts(features, target, split) for split in range(SPLITS)]))
        experts = np.load(path, allow_pickle=False)
        parts = []
        for purpose in range(4):
            columns: list[list[np.ndarray]] = [[], [], [], []]
            for split in range(SPLITS):
                numbers = _split(len(target), split)
                rows = numbers[purpose]
                mean, deviation = target[numbers[0]].mean(), target[numbers[0]].std()
                answers = (experts[split, rows] - mean) / deviation
                for column, values in zip(
                    columns, (rows, features[rows], (target[rows] - mean) / deviation, answers), strict=True
                ):
                    column.append(values)
            numbers_, x, y, answers = (torch.from_numpy(np.stack(column)) for column in columns)
            parts.append(Columns(numbers_, x.float(), y.float(), answers.float()))
        return Problem(len(target), *parts, steps=steps)

    def learn(self, rows: Columns, outputs: int, loss: Callable[[Tensor, Tensor], Tensor], *, hidden: int = 32) -> Head:
        """A head on these rows: `loss(head's outputs (S, B, outputs), row numbers (S, B)) -> (S, B)`."""
        head = Head(rows.x, outputs, hidden=hidden, seed=0)
        self.train_on([head], rows, lambda i: loss(head(at(rows.x, i)), i))
        return head

    def train_on(self, heads: list[Head], rows: Columns, loss: Callable[[Tensor], Tensor]) -> None:
        """Every head by the same recipe."""
        fit(heads, loss, SPLITS, rows.x.shape[1], steps=self.steps, seed=0, batch=128, learning_rate=3e-3, weight_decay=0.01)


def predictor(problem: Problem, rows: Columns) -> Head:
    """Least squares with 32 hidden units."""
    return problem.learn(rows, 1, lambda out, i: (out.squeeze(-1) - at(rows.y, i)).square())


def judged(problem: Problem, costs: str, own: Head, scores: Callable[[Columns, Tensor], Tensor]) -> Judged:
    """Judge every split with its own threshold, then average over the splits that test a row."""
    calibration, test = (
        (scores(part, own(part.x).squeeze(-1)), part.with_own(own(part.x).squeeze(-1), costs))
        for part in (problem.calibration, problem.test)
    )
    splits = [judge(Outputs(calibration[0][s], calibration[1][s]), Outputs(test[0][s], test[1][s])) for s in range(SPLITS)]
    return _averaged(problem, splits)


def baseline(problem: Problem, costs: str, own: Head, name: str) -> Judged:
    """Never, or always the expert that is cheapest on the calibration rows."""
    test = problem.test.with_own(own(problem.test.x).squeeze(-1), costs)
    calibration = problem.calibration.with_own(own(problem.calibration.x).squeeze(-1), costs)
    best = calibration[..., 1:].mean(dim=1).argmin(dim=-1) + 1
    actions = [0 if name == NEVER else int(best[s]) for s in range(SPLITS)]
    return _averaged(problem, [fixed(Outputs(test[s], test[s]), action) for s, action in enumerate(actions)])


def variance_threshold(problem: Problem, costs: str, own: Head) -> Judged:
    """Ask the expert that is cheapest on average where the learned loss of the predictor is high."""
    rows = problem.stage2
    own_loss = (own(rows.x).squeeze(-1) - rows.y).square()
    variance = problem.learn(rows, 1, lambda out, i: learned_loss(out.squeeze(-1), at(own_loss, i)))
    return judged(problem, costs, own, lambda part, _: _against_best(problem, part, costs, own, variance(part.x).squeeze(-1)))


def no_rejection(problem: Problem, costs: str, own: Head) -> Judged:
    """The predictor has learned from the rows of both stages; its loss is that of the 10 nearest calibration rows."""
    known = problem.calibration
    losses = (own(known.x).squeeze(-1) - known.y).square()
    mean, deviation = known.x.mean(1, keepdim=True), known.x.std(1, keepdim=True).clamp(min=1e-3)

    def scores(part: Columns, _: Tensor) -> Tensor:
        distances = torch.cdist((part.x - mean) / deviation, (known.x - mean) / deviation)
        if part is known:
            distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # a row is not its own neighbour
        nearest = distances.topk(10, dim=-1, largest=False).indices
        estimate = at(losses, nearest.flatten(1)).view(nearest.shape).mean(dim=-1)
        return _against_best(problem, part, costs, own, estimate)

    return judged(problem, costs, own, scores)


def post_hoc(problem: Problem, costs: str, own: Head) -> Judged:
    """The cost of every action is regressed; the cheapest by estimate is taken."""
    rows = problem.stage2
    table = rows.with_own(own(rows.x).squeeze(-1), costs)
    estimate = problem.learn(rows, table.shape[-1], lambda out, i: (out - at(table, i)).square().sum(dim=-1))
    return judged(problem, costs, own, lambda part, _: -estimate(part.x))


def two_stage(problem: Problem, costs: str, own: Head) -> Judged:
    """The predictor is fixed; a rejector of its own learns on rows that neither predictor nor experts saw."""
    rows = problem.stage2
    table = rows.with_own(own(rows.x).squeeze(-1), costs)
    if costs == ABSTENTION:

        def loss(out: Tensor, i: Tensor) -> Tensor:
            return regression_abstention(at(table, i)[..., 0], out.squeeze(-1), 0.1)

    else:

        def loss(out: Tensor, i: Tensor) -> Tensor:
            chosen = at(table, i)
            return regression_deferral(chosen[..., 0], out, chosen[..., 1:])

    rejector = problem.learn(rows, 1 if costs == ABSTENTION else table.shape[-1], loss)
    return judged(problem, costs, own, lambda part, _: _scores(rejector(part.x)))


def single_stage(problem: Problem, costs: str, own: Head) -> Judged:
    """Predictor (started from the fitted one) and rejector learn together."""
    rows = problem.stage2
    abstains = costs == ABSTENTION
    experts = rows.with_own(rows.y, costs)[..., 1:]
    together = Head(problem.train.x, 1, hidden=32, seed=0)
    together.load_state_dict(own.state_dict())
    rejector = Head(rows.x, 1 if abstains else 1 + experts.shape[-1], hidden=32, seed=0)

    def loss(i: Tensor) -> Tensor:
        x = at(rows.x, i)
        own_loss, r = (together(x).squeeze(-1) - at(rows.y, i)).square(), rejector(x)
        if abstains:
            return regression_abstention(own_loss, r.squeeze(-1), 0.1)
        return regression_deferral(own_loss, r, at(experts, i))

    problem.train_on([together, rejector], rows, loss)
    return judged(problem, costs, together, lambda part, _: _scores(rejector(part.x)))


LEARNED = {
    VARIANCE: variance_threshold,
    "no-rejection learning": no_rejection,
    "post-hoc": post_hoc,
    "two-stage": two_stage,
    "single-stage": single_stage,
}


def run_cells(run: Run, data_sets: tuple[str, ...]) -> None:
    """Every open cell of the table."""
    steps = STEPS[run.preset_name]
    cells = [
        Cell(TABLE, data, method, costs, 0, run.preset_name)
        for data in data_sets
        for costs in COSTS
        for method in METHODS
        if not (costs == ABSTENTION and method == "post-hoc")  # that is the variance threshold again
    ]
    problem = cache(partial(Problem.read, run, steps=steps))
    own = cache(lambda data: predictor(problem(data), problem(data).train))
    own_of_both = cache(lambda data: predictor(problem(data), _joined(problem(data).train, problem(data).stage2)))
    variance = cache(lambda data, costs: variance_threshold(problem(data), costs, own(data)))

    def work(cell: Cell) -> Finding:
        data, costs, method = cell.data, cell.cost, cell.method
        references = {name: baseline(problem(data), costs, own(data), name) for name in (NEVER, ALWAYS)}
        references[VARIANCE] = variance(data, costs)
        if method in references:
            found = references.pop(method)
        else:
            found = LEARNED[method](problem(data), costs, (own_of_both if method == "no-rejection learning" else own)(data))
        return Finding([Part(found, references)], {"splits": SPLITS, "shares": SHARES, "betas": BETAS, "steps": steps})

    run.each(cells, work)


@click.command()
@options(presets=tuple(STEPS), seeds=1)
@click.option("--data", type=click.Choice(list(DATA)), multiple=True, default=tuple(DATA))
def command(data: tuple[str, ...], **given) -> None:
    """Deferral and abstention in regression on eight UCI sets, 20 splits."""
    with running(**given) as run:
        run_cells(run, data)


def main(arguments: list[str]) -> None:
    """Run from `python -m benchmarks`."""
    command.main(arguments, prog_name="python -m benchmarks regression")


def _split(rows: int, split: int) -> list[np.ndarray]:
    order = np.random.default_rng(split).permutation(rows)
    ends = np.rint(np.cumsum(SHARES)[:-1] * rows).astype(int)
    return np.split(order, ends)


def _experts(features: np.ndarray, target: np.ndarray, split: int) -> np.ndarray:
    """What the three experts of a split answer on every row.  -> (N, 3)"""
    from sklearn.ensemble import GradientBoostingRegressor

    rows = _split(len(target), split)[0]
    scaled = (features[rows] - features[rows].mean(0)) / np.maximum(features[rows].std(0), 1e-9)
    direction = np.linalg.svd(scaled, full_matrices=False)[2][0]
    direction = direction * np.sign(direction[np.abs(direction).argmax()])  # the sign of a component is arbitrary
    thirds = np.array_split(rows[np.argsort(scaled @ direction, kind="stable")], 3)
    boosted = [GradientBoostingRegressor(random_state=0).fit(features[third], target[third]) for third in thirds]
    return np.stack([model.predict(features) for model in boosted], axis=-1)


def _joined(first: Columns, second: Columns) -> Columns:
    return Columns(*(torch.cat(pair, dim=1) for pair in zip(vars(first).values(), vars(second).values(), strict=True)))


def _scores(r: Tensor) -> Tensor:
    """One output r > 0 keeps; several are the scores themselves."""
    return torch.cat([r, torch.zeros_like(r)], dim=-1) if r.shape[-1] == 1 else r


def _against_best(problem: Problem, part: Columns, costs: str, own: Head, estimate: Tensor) -> Tensor:
    """Scores of keeping at this estimated loss, and of asking the expert whose mean calibration cost is lowest."""
    calibration = problem.calibration.with_own(own(problem.calibration.x).squeeze(-1), costs)[..., 1:].mean(dim=1)
    best = calibration == calibration.amin(dim=-1, keepdim=True)
    asked = (-calibration).where(best, -1e3).unsqueeze(1).expand(-1, part.x.shape[1], -1)
    return torch.cat([-estimate.unsqueeze(-1), asked], dim=-1)


def _averaged(problem: Problem, splits: list[Judged]) -> Judged:
    names = [name for name, value in vars(splits[0]).items() if value is not None]
    together = Judged(**{name: torch.cat([getattr(split, name) for split in splits]) for name in names})
    return together.mean_over(problem.test.numbers.flatten(), problem.rows)
