"""CIFAR-10 with real people: a small network answers, or asks "a random person" at a price.

The person of a training image is drawn from its three CIFAR-10N labels (right on about 82%), the person of a test image from
its CIFAR-10H counts (right on 95%).  40,000 training images make the predictor; on the other 10,000, which it did not see, the
second stage learns (8,000) and gets a first threshold (2,000).  The people change between training and test, and with them
the right threshold: it is fitted once more on 2,000 CIFAR-10H rows, and every method is judged on the remaining 8,000.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from deferral.baselines import compare_confidence, deferral_gains, post_hoc_scores, selective_prediction
from deferral.calibration import fit_offsets
from deferral.datasets import Images, cifar10, cifar10h_counts, cifar10n_annotators
from deferral.decision import decide, oracle
from deferral.demo import OURS
from deferral.demo.convnet import EPOCHS, ConvNet, predict, trained
from deferral.demo.training import fit, mlp
from deferral.evaluation.comparison import Comparison, Method, System
from deferral.experts import random_annotator, random_person
from deferral.losses import two_stage_deferral

__all__ = ["PRICES", "run"]

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PRICES = (0.05, 0.1)
PREDICTOR_ROWS, STAGE2_ROWS = 40_000, 8_000  # of the 50,000 training images; the last 2,000 give a first threshold
THRESHOLD_ROWS = 2_000  # of the 10,000 test images


@dataclass(frozen=True)
class Part:
    """The rows of one purpose: what the second stage sees, the model's probabilities, labels, the person's answer."""

    features: Tensor
    probabilities: Tensor
    targets: Tensor
    person: Tensor

    def __getitem__(self, rows: slice) -> "Part":
        return Part(*(column[rows] for column in vars(self).values()))

    @property
    def confidence(self) -> Tensor:
        return self.probabilities.amax(dim=-1)

    def system(self, price: float) -> System:
        """Action 0 is the model's answer, action 1 the person's."""
        return System.of(self.probabilities.argmax(dim=-1), self.person.unsqueeze(-1), self.targets, [price])


def run(
    root: Path,
    people: Path,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    checkpoint: Path,
    *,
    epochs: int = EPOCHS,
) -> list[Comparison]:
    """Train the network (or resume it from the checkpoint) and judge every method, once per price."""
    task = progress.add_task("reading CIFAR-10", total=epochs + 3 * len(PRICES))
    annotators, counts = cifar10n_annotators(people), cifar10h_counts(people)
    train_images, test_images = cifar10(root, train=True).to(device), cifar10(root, train=False).to(device)
    order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(seed))
    held_out = order[PREDICTOR_ROWS:]

    progress.update(task, description=f"training the network, epoch 1 of {epochs}")
    model = trained(
        train_images[order[:PREDICTOR_ROWS].to(device)],
        checkpoint,
        seed=seed,
        epochs=epochs,
        on_epoch=lambda done: progress.update(
            task, completed=done, description=f"training the network, epoch {min(done + 1, epochs)} of {epochs}"
        ),
    )
    stage2 = _part(model, train_images[held_out.to(device)], random_annotator(annotators[held_out], seed=seed))
    shuffled = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(seed))
    test = _part(model, test_images[shuffled.to(device)], random_person(counts[shuffled], seed=seed))

    comparisons = []
    for price in PRICES:
        comparisons.append(_compare(stage2, test, price, seed, lambda stage: progress.update(task, description=stage, advance=1)))
    return comparisons


def _part(model: ConvNet, data: Images, person: Tensor) -> Part:
    probabilities = predict(model, data.images).softmax(dim=-1)
    # Chow's signal first, so that the second stage can do no worse than find it again: the log-odds of the top class.
    ranked = probabilities.sort(dim=-1, descending=True).values
    others = ranked[:, 1:].sum(dim=-1, keepdim=True).clamp(min=1e-12)
    features = torch.cat([ranked[:, :1].log() - others.log(), ranked[:, :5], probabilities], dim=-1)
    return Part(features, probabilities, data.labels, person.to(data.labels.device))


def _compare(stage2: Part, test: Part, price: float, seed: int, on_stage: Callable[[str], None]) -> Comparison:
    fitting, training_people = stage2[:STAGE2_ROWS], stage2[STAGE2_ROWS:]
    test_people, judged = test[:THRESHOLD_ROWS], test[THRESHOLD_ROWS:]
    costs = fitting.system(price).costs
    person_right = (fitting.person == fitting.targets).float()

    def second_stage(outputs: int, loss: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(seed)
        model = mlp(fitting.features, outputs)
        fit(
            model,
            lambda rows: loss(model(fitting.features[rows]), rows),
            len(fitting.features),
            steps=1000,
            batch_size=200,
            learning_rate=1e-3,
            weight_decay=1.0,
            seed=seed,
        )
        return model.requires_grad_(False)

    on_stage(f"price {price}: two-stage deferral")
    # mu = 1 with the row's sum as ceiling weighs each action by the other's cost: its scores are the log-odds of the two
    # expected costs, which order the rows well at every threshold, and the threshold will move.
    ceiling = costs.sum(dim=-1, keepdim=True)
    router = second_stage(2, lambda scores, rows: two_stage_deferral(scores, costs[rows], ceiling=ceiling[rows]))
    on_stage(f"price {price}: the person's skill")
    skill = second_stage(
        1, lambda s, rows: F.binary_cross_entropy_with_logits(s.squeeze(-1), person_right[rows], reduction="none")
    )

    on_stage(f"price {price}: what the person saves")
    gains = deferral_gains(costs)
    gain = second_stage(1, lambda scores, rows: (scores - gains[rows]).square().squeeze(-1))

    def chow(part: Part) -> Tensor:
        return selective_prediction(part.confidence.unsqueeze(-1), 1 - person_right.mean(dim=0, keepdim=True) + price)

    def compared_confidences(part: Part) -> Tensor:
        return compare_confidence(part.confidence.unsqueeze(-1), skill(part.features).sigmoid(), price=price)

    def post_hoc(part: Part) -> Tensor:
        return post_hoc_scores(gain(part.features))

    def two_stage(part: Part) -> Tensor:
        return router(part.features)

    system = judged.system(price)

    def thresholded(name: str, scores_of: Callable[[Part], Tensor], rows: Part) -> tuple[Method, float]:
        offsets = fit_offsets(scores_of(rows), rows.system(price).costs, num_own=1)
        scores = scores_of(judged) + offsets
        return system.take(name, decide(scores), scores), float(offsets[1])

    chow_before, _ = thresholded("Chow's rule, threshold of the training people", chow, training_people)
    chow_fitted, _ = thresholded("Chow's rule", chow, test_people)
    compared, _ = thresholded("compare-confidence", compared_confidences, test_people)
    after_the_fact, _ = thresholded("post-hoc deferral", post_hoc, test_people)
    before, offset_before = thresholded("two-stage, threshold of the training people", two_stage, training_people)
    ours, offset_after = thresholded(OURS, two_stage, test_people)
    order = torch.randperm(len(ours.actions), generator=torch.Generator().manual_seed(seed))
    comparison = Comparison(
        name=f"cifar10-price{price}-seed{seed}",
        title=f"CIFAR-10, {len(judged.targets)} test images, a random person at price {price}, seed {seed}",
        reference=OURS,
        methods=[
            system.always("the model alone", 0),
            system.always("always the person", 1),
            system.take("random rows, same shares", ours.actions[order].to(judged.targets.device)),
            chow_before,
            chow_fitted,
            compared,
            after_the_fact,
            before,
            ours,
            system.take("oracle", oracle(system.costs)),
        ],
        experts=["person"],
        classes=CLASSES,
        targets=judged.targets.cpu(),
        settings={
            "data": "cifar10",
            "seed": seed,
            "device": str(judged.targets.device),
            "price": price,
            "rows": {"predictor": PREDICTOR_ROWS, "stage 2": STAGE2_ROWS, "threshold": THRESHOLD_ROWS},
        },
        notes=[
            f"People changed: right on {100 * person_right.mean():.1f}% of the training images (CIFAR-10N), on "
            f"{100 * (judged.person == judged.targets).float().mean():.1f}% of the test images (CIFAR-10H).  The offset of "
            f"asking moved from {offset_before:+.2f} to {offset_after:+.2f}, the share asked from "
            f"{100 * (1 - before.kept.mean()):.1f}% to {100 * (1 - ours.kept.mean()):.1f}%.",
        ],
    )
    gap = comparison.figures[chow_fitted.name].difference
    interval = f"{gap.estimate:+.4f}, 95% interval [{gap.low:+.4f}, {gap.high:+.4f}]"
    if gap.excludes_zero():
        order_of_costs = "cheaper" if gap.high < 0 else "dearer"
        verdict = f"Two-stage deferral is {order_of_costs} than Chow's rule with a fitted threshold ({interval})."
    else:
        verdict = (
            f"Two-stage deferral and Chow's rule with a fitted threshold tie ({interval}): a random person's skill hardly "
            "depends on the image, so there is little to learn beyond the model's own doubt."
        )
    comparison.notes.append(verdict)
    return comparison
