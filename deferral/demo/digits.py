"""The first command: handwritten digits, a small frozen model, three simulated experts, and what deferring saves.

Fixed before any result was seen: 40 labelled rows for the predictor, then frozen; 500 rows for the second stage, 300 for the
thresholds, the rest for the test.  Expert A is right on 98% of everything and dear, B knows the digits 0-4 and C the digits
5-9, and both are cheap.  The rows "retrained" use the 500 labels for the predictor too, which a frozen model cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


def run(seed: int, device: torch.device | str, progress: Progress, *, useless_expert: bool = False) -> Comparison:
    """Train every method and judge it on the test rows."""
    experts = EXPERTS | (USELESS if useless_expert else {})
    prices = [price for _, price in experts.values()]
    ceiling = 1 + max(prices)
    first, stage2, calibration, test = _split(seed, device, [confusion for confusion, _ in experts.values()])
    labelled = first + stage2
    task = progress.add_task("", total=8)

    def train(name: str, outputs: int, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> nn.Sequential:
        progress.update(task, description=f"training: {name}")
        torch.manual_seed(seed)
        model = mlp(x, outputs)
        fit(model, lambda rows: loss(model(x[rows]), rows), len(x), seed=seed, **TRAINING)
        progress.advance(task)
        return model.requires_grad_(False)

    # Stage 1: the model that cannot be retrained.
    predictor = train("predictor", K, first.pixels, lambda s, i: F.cross_entropy(s, first.targets[i], reduction="none"))

    def system(part: Part, model: nn.Module = predictor) -> System:
        own = model(part.pixels)[:, :K].argmax(dim=-1)
        return System.of(own, part.experts, part.targets, prices, ABSTAIN_COST)

    def features(part: Part) -> Tensor:
        scores = predictor(part.pixels)
        return torch.cat([scores.softmax(-1), scores.log_softmax(-1), predictor[:-1](part.pixels), part.pixels], dim=-1)

    # Stage 2, on rows that stage 1 did not see.
    x, costs = features(stage2), system(stage2).costs
    router = train(
        "two-stage deferral",
        1 + len(experts),
        x,
        lambda s, i: two_stage_deferral(s, costs[i, :-1], mu=1.7, ceiling=ceiling),
    )
    rejector = train("two-stage abstention", 1, x, lambda s, i: two_stage_abstention(s.squeeze(-1), costs[i, 0], ABSTAIN_COST))
    right = 1 - (stage2.experts != stage2.targets.unsqueeze(-1)).float()
    skill = train(
        "experts' skill",
        len(experts),
        x,
        lambda s, i: F.binary_cross_entropy_with_logits(s, right[i], reduction="none").mean(-1),
    )

    gains = deferral_gains(costs[:, :-1])
    gain = train("what each expert saves", len(experts), x, lambda s, i: (s - gains[i]).square().mean(-1))

    # The same losses where the predictor may learn from every label.
    y, expert_costs = labelled.targets, system(labelled).costs[:, 1:-1]
    retrained = train("no deferral", K, labelled.pixels, lambda s, i: F.cross_entropy(s, y[i], reduction="none"))
    abstaining = train(
        "score-based abstention", K + 1, labelled.pixels, lambda s, i: score_based_abstention(s, y[i], ABSTAIN_COST)
    )
    deferring = train(
        "single-stage deferral",
        K + len(experts),
        labelled.pixels,
        lambda s, i: single_stage_deferral(s, y[i], expert_costs[i], ceiling=ceiling),
    )

    def thresholded(name: str, scores_of: Callable[[Part], Tensor], model: nn.Module = predictor) -> Method:
        """Offsets fitted on the calibration rows, decisions on the test rows."""
        offsets = fit_offsets(scores_of(calibration), system(calibration, model).costs, num_own=1)
        scores = scores_of(test) + offsets
        # What abstains leaves rows without an answer: it belongs in the table, not on one axis with those that answer all.
        # A retrained model starts and ends elsewhere, so it is a point without a curve.
        curve = scores if model is predictor else None
        return system(test, model).take(name, decide(scores), curve, drawn="abstain" not in name)

    def offered(own: Tensor, experts_scores: Tensor | None = None, abstain: Tensor | None = None) -> Tensor:
        """Scores over all actions; what is not offered gets -inf."""
        closed = torch.full_like(own, -torch.inf)
        middle = closed.unsqueeze(-1).expand(-1, len(experts)) if experts_scores is None else experts_scores
        return torch.cat([own.unsqueeze(-1), middle, (closed if abstain is None else abstain).unsqueeze(-1)], dim=-1)

    def confidence(part: Part) -> Tensor:
        return predictor(part.pixels).softmax(-1).amax(dim=-1)

    def chow_to_best(part: Part) -> Tensor:
        own = confidence(part)
        scores = selective_prediction(own.unsqueeze(-1), system(calibration).costs[:, 1:-1].mean(dim=0))
        return offered(own, scores[:, 1:])

    def compared_confidences(part: Part) -> Tensor:
        own = confidence(part)
        right = skill(features(part)).sigmoid()
        return offered(own, compare_confidence(own.unsqueeze(-1), right, price=torch.tensor(prices, device=device))[:, 1:])

    def post_hoc(part: Part) -> Tensor:
        scores = post_hoc_scores(gain(features(part)))
        return offered(scores[:, 0], scores[:, 1:])

    def single_stage_scores(part: Part) -> Tensor:
        scores = deferring(part.pixels)
        return offered(scores[:, :K].amax(dim=-1), scores[:, K:])

    def abstain_scores(part: Part) -> Tensor:
        scores = abstaining(part.pixels)
        return offered(scores[:, :K].amax(dim=-1), abstain=scores[:, K])

    def rejector_scores(part: Part) -> Tensor:
        r = rejector(features(part)).squeeze(-1)
        return offered(r, abstain=torch.zeros_like(r))

    def chow_abstains(part: Part) -> Tensor:
        own = confidence(part)
        return offered(own, abstain=torch.full_like(own, 1 - ABSTAIN_COST))

    judged = system(test)
    ours = thresholded(OURS, lambda part: offered(router(features(part))[:, 0], router(features(part))[:, 1:]))
    shuffled = ours.actions[torch.randperm(len(ours.actions), generator=torch.Generator().manual_seed(seed))]
    methods = [
        judged.always("the model alone", 0),
        *(judged.always(f"always {name}", 1 + j) for j, name in enumerate(experts)),
        judged.take("random rows, same shares", shuffled.to(judged.targets.device)),
        thresholded("Chow's rule to the best expert", chow_to_best),
        thresholded("compare-confidence", compared_confidences),
        thresholded("post-hoc deferral", post_hoc),
        ours,
        thresholded("abstain: Chow's rule", chow_abstains),
        thresholded("abstain: two-stage", rejector_scores),
        system(test, retrained).always("retrained: the model alone", 0),
        thresholded("retrained: abstain, score-based", abstain_scores, abstaining),
        thresholded("retrained: single-stage deferral", single_stage_scores, deferring),
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


def _split(seed: int, device: torch.device | str, confusions: list[Tensor]) -> list[Part]:
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    data = data[torch.randperm(len(data), generator=generator)].to(device)
    # One seed per expert and run: no two experts share their luck.
    answers = [draw_answers(confusion, data.labels, seed=1000 * seed + j) for j, confusion in enumerate(confusions)]
    sizes = [*SIZES.values(), len(data) - sum(SIZES.values())]
    columns = (data.images.flatten(1), data.labels, torch.stack(answers, dim=-1))
    return [Part(*rows) for rows in zip(*(column.split(sizes) for column in columns), strict=True)]
