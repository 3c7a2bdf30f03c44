"""The first command: handwritten digits, a small frozen model, three simulated experts, and what deferring saves.

Fixed before any result was seen: 40 labelled rows for the predictor, then frozen; 500 rows for the second stage, 300 for the
thresholds, the rest for the test.  Expert A is right on 98% of everything and dear, B knows the digits 0-4 and C the digits
5-9, and both are cheap.  The rows "retrained" use the 500 labels for the predictor too, which a frozen model cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from deferral.baselines import compare_confidence, deferral_gains, post_hoc_scores, selective_prediction
from deferral.calibration import fit_offsets
from deferral.datasets import digits
from deferral.decision import decide, oracle
from deferral.demo import OURS
from deferral.demo.training import fit, mlp
from deferral.evaluation.comparison import Comparison, Method, System
from deferral.experts import draw_answers, even_skill, specialist
from deferral.losses import (
    score_based_abstention,
    single_stage_deferral,
    two_stage_abstention,
    two_stage_deferral,
)

__all__ = ["run"]

K = 10
SIZES = {"predictor": 40, "stage 2": 500, "calibration": 300}
EXPERTS = {  # name: (confusion matrix, price)
    "A": (even_skill(0.98, K), 0.15),
    "B": (specialist(range(5), K), 0.03),
    "C": (specialist(range(5, 10), K), 0.03),
}
USELESS = {"D": (even_skill(1 / K, K), 0.30)}
ABSTAIN_COST = 0.15  # what A would cost if A were always right
TRAINING: dict[str, Any] = {"steps": 600, "learning_rate": 3e-3, "weight_decay": 1.0}


@dataclass(frozen=True)
class Part:
    """The rows of one purpose: pixels (N, 64), labels (N,), the experts' answers (N, E)."""

    pixels: Tensor
    targets: Tensor
    experts: Tensor

    def __add__(self, other: "Part") -> "Part":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Part(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class Models:
    """The predictor, which is frozen, what was learned beside it, and what learned from the second stage's labels as well."""

    predictor: nn.Sequential
    router: nn.Sequential
    rejector: nn.Sequential
    skill: nn.Sequential  # whether each expert is right
    gain: nn.Sequential  # what each expert saves
    retrained: nn.Sequential
    abstaining: nn.Sequential
    deferring: nn.Sequential


@dataclass(frozen=True)
class Contest:
    """Scores of every method over all actions (own answer, experts, abstaining); what it does not offer has -inf.

    Thresholds are fitted on the rows of `calibration`, decisions are those on the rows of `test`.
    """

    models: Models
    prices: list[float]
    calibration: Part
    test: Part

    def system(self, part: Part, model: nn.Module | None = None) -> System:
        return _system(self.models.predictor if model is None else model, part, self.prices)

    def thresholded(self, name: str, scores_of: Callable[[Part], Tensor], model: nn.Module | None = None) -> Method:
        offsets = fit_offsets(scores_of(self.calibration), self.system(self.calibration, model).costs, num_own=1)
        scores = scores_of(self.test) + offsets
        # What abstains leaves rows without an answer: it belongs in the table, not on one axis with those that answer all.
        # A retrained model starts and ends elsewhere, so it is a point without a curve.
        curve = scores if model is None else None
        return self.system(self.test, model).take(name, decide(scores), curve, drawn="abstain" not in name)

    def confidence(self, part: Part) -> Tensor:
        return self.models.predictor(part.pixels).softmax(-1).amax(dim=-1)

    def chow_to_best(self, part: Part) -> Tensor:
        own = self.confidence(part)
        scores = selective_prediction(own.unsqueeze(-1), self.system(self.calibration).costs[:, 1:-1].mean(dim=0))
        return self._offered(own, scores[:, 1:])

    def compared_confidences(self, part: Part) -> Tensor:
        own, right = self.confidence(part), self.models.skill(_features(self.models.predictor, part)).sigmoid()
        price = torch.tensor(self.prices, device=own.device)
        return self._offered(own, compare_confidence(own.unsqueeze(-1), right, price=price)[:, 1:])

    def post_hoc(self, part: Part) -> Tensor:
        scores = post_hoc_scores(self.models.gain(_features(self.models.predictor, part)))
        return self._offered(scores[:, 0], scores[:, 1:])

    def two_stage(self, part: Part) -> Tensor:
        scores = self.models.router(_features(self.models.predictor, part))
        return self._offered(scores[:, 0], scores[:, 1:])

    def single_stage(self, part: Part) -> Tensor:
        scores = self.models.deferring(part.pixels)
        return self._offered(scores[:, :K].amax(dim=-1), scores[:, K:])

    def chow_abstains(self, part: Part) -> Tensor:
        own = self.confidence(part)
        return self._offered(own, abstain=torch.full_like(own, 1 - ABSTAIN_COST))

    def two_stage_abstains(self, part: Part) -> Tensor:
        r = self.models.rejector(_features(self.models.predictor, part)).squeeze(-1)
        return self._offered(r, abstain=torch.zeros_like(r))

    def score_based_abstains(self, part: Part) -> Tensor:
        scores = self.models.abstaining(part.pixels)
        return self._offered(scores[:, :K].amax(dim=-1), abstain=scores[:, K])

    def _offered(self, own: Tensor, experts: Tensor | None = None, abstain: Tensor | None = None) -> Tensor:
        closed = torch.full_like(own, -torch.inf)
        middle = closed.unsqueeze(-1).expand(-1, len(self.prices)) if experts is None else experts
        return torch.cat([own.unsqueeze(-1), middle, (closed if abstain is None else abstain).unsqueeze(-1)], dim=-1)


def run(seed: int, device: torch.device | str, progress: Progress, *, useless_expert: bool = False) -> Comparison:
    """Train every method and judge it on the test rows."""
    experts = EXPERTS | (USELESS if useless_expert else {})
    prices = [price for _, price in experts.values()]
    first, stage2, calibration, test = _split(seed, device, [confusion for confusion, _ in experts.values()])
    task = progress.add_task("", total=len(fields(Models)))
    models = _trained(first, stage2, prices, seed, lambda name: progress.update(task, description=name, advance=1))
    contest = Contest(models, prices, calibration, test)
    judged = contest.system(test)
    ours = contest.thresholded(OURS, contest.two_stage)
    shuffled = ours.actions[torch.randperm(len(ours.actions), generator=torch.Generator().manual_seed(seed))]
    methods = [
        judged.always("the model alone", 0),
        *(judged.always(f"always {name}", 1 + j) for j, name in enumerate(experts)),
        judged.take("random rows, same shares", shuffled.to(judged.targets.device)),
        contest.thresholded("Chow's rule to the best expert", contest.chow_to_best),
        contest.thresholded("compare-confidence", contest.compared_confidences),
        contest.thresholded("post-hoc deferral", contest.post_hoc),
        ours,
        contest.thresholded("abstain: Chow's rule", contest.chow_abstains),
        contest.thresholded("abstain: two-stage", contest.two_stage_abstains),
        contest.system(test, models.retrained).always("retrained: the model alone", 0),
        contest.thresholded("retrained: abstain, score-based", contest.score_based_abstains, models.abstaining),
        contest.thresholded("retrained: single-stage deferral", contest.single_stage, models.deferring),
        judged.take("oracle", oracle(judged.costs[:, :-1])),
    ]
    progress.update(task, description="done")
    return Comparison(
        name=f"digits-seed{seed}" + ("-useless-expert" if useless_expert else ""),
        title=f"Handwritten digits, {len(test.targets)} test rows, seed {seed}: "
        f"a model trained on {SIZES['predictor']} rows, and its experts",
        reference=OURS,
        methods=methods,
        experts=list(experts),
        classes=[str(label) for label in range(K)],
        targets=test.targets.cpu(),
        settings={
            "data": "digits",
            "seed": seed,
            "device": str(device),
            "rows": SIZES,
            "prices": prices,
            "abstain_cost": ABSTAIN_COST,
        },
        notes=[
            f"Rows that are neither kept nor sent to an expert abstain, at {ABSTAIN_COST} each.",
            f"The model is frozen: it saw {SIZES['predictor']} rows.  The rows 'retrained' learn from the second stage's "
            f"{SIZES['stage 2']} labels as well: where a model can be retrained, retrain it.",
        ],
    )


def _trained(first: Part, stage2: Part, prices: list[float], seed: int, on_stage: Callable[[str], None]) -> Models:
    """Each model by its loss; `on_stage` is told which."""
    experts = len(prices)
    ceiling = 1 + max(prices)

    def train(name: str, outputs: int, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> nn.Sequential:
        on_stage(f"training: {name}")
        torch.manual_seed(seed)
        model = mlp(x, outputs)
        fit(model, lambda rows: loss(model(x[rows]), rows), len(x), seed=seed, **TRAINING)
        return model.requires_grad_(False)

    # Stage 1: the model that cannot be retrained.
    predictor = train("predictor", K, first.pixels, lambda s, i: F.cross_entropy(s, first.targets[i], reduction="none"))
    # Stage 2, on rows that stage 1 did not see.
    x, costs = _features(predictor, stage2), _system(predictor, stage2, prices).costs
    right, gains = (stage2.experts == stage2.targets.unsqueeze(-1)).float(), deferral_gains(costs[:, :-1])
    # The same losses where the predictor may learn from every label.
    labelled = first + stage2
    y, expert_costs = labelled.targets, _system(predictor, labelled, prices).costs[:, 1:-1]
    return Models(
        predictor,
        router=train(
            "two-stage deferral", 1 + experts, x, lambda s, i: two_stage_deferral(s, costs[i, :-1], mu=1.7, ceiling=ceiling)
        ),
        rejector=train("two-stage abstention", 1, x, lambda s, i: two_stage_abstention(s.squeeze(-1), costs[i, 0], ABSTAIN_COST)),
        skill=train(
            "experts' skill",
            experts,
            x,
            lambda s, i: F.binary_cross_entropy_with_logits(s, right[i], reduction="none").mean(-1),
        ),
        gain=train("what each expert saves", experts, x, lambda s, i: (s - gains[i]).square().mean(-1)),
        retrained=train("no deferral", K, labelled.pixels, lambda s, i: F.cross_entropy(s, y[i], reduction="none")),
        abstaining=train(
            "score-based abstention", K + 1, labelled.pixels, lambda s, i: score_based_abstention(s, y[i], ABSTAIN_COST)
        ),
        deferring=train(
            "single-stage deferral",
            K + experts,
            labelled.pixels,
            lambda s, i: single_stage_deferral(s, y[i], expert_costs[i], ceiling=ceiling),
        ),
    )


def _system(model: nn.Module, part: Part, prices: list[float]) -> System:
    own = model(part.pixels)[:, :K].argmax(dim=-1)
    return System.of(own, part.experts, part.targets, prices, ABSTAIN_COST)


def _features(predictor: nn.Sequential, part: Part) -> Tensor:
    """What the second stage sees: the predictor's probabilities, their logarithms, its hidden layer and the pixels."""
    scores = predictor(part.pixels)
    return torch.cat([scores.softmax(-1), scores.log_softmax(-1), predictor[:-1](part.pixels), part.pixels], dim=-1)


def _split(seed: int, device: torch.device | str, confusions: list[Tensor]) -> list[Part]:
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    data = data[torch.randperm(len(data), generator=generator)].to(device)
    # One seed per expert and run: no two experts share their luck.
    answers = [draw_answers(confusion, data.labels, seed=1000 * seed + j) for j, confusion in enumerate(confusions)]
    sizes = [*SIZES.values(), len(data) - sum(SIZES.values())]
    columns = (data.images.flatten(1), data.labels, torch.stack(answers, dim=-1))
    return [Part(*rows) for rows in zip(*(column.split(sizes) for column in columns), strict=True)]
