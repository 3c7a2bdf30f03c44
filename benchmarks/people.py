"""Deferral to real people.  python -m benchmarks people --preset laptop

Claim: learned deferral does better than the model and the person alone; against Chow's rule with a fitted threshold it can win
where people's skill depends on the row.  Bars, recomputed from public outputs of a classifier that is right on 93.90%
(CIFAR-10H, 2,000 test images, threshold from a calibration split), system accuracy in %: compare-confidence 97.70 +- 0.70,
RealizableSurrogate 97.50, selective prediction (Chow's rule) 97.30, one-vs-all 96.95, asymmetric softmax 96.90,
Mozannar-Sontag 96.30.

split of CIFAR-10H   the published protocol: 70 / 10 / 20% of the test images learn, calibrate and test; a random person of 95%
CIFAR-10N to 10H     heads learn from the annotators of the training images (82%), the threshold from 20% of CIFAR-10H
groups by class      simulated: one group is right on 95% of the animals and 60% of the vehicles, the other the reverse
hate speech          words and word pairs; 40 / 20 / 10 / 30% for classifier, heads, threshold, test; any of its annotators,
                     whose vote is one of those that make the label: asking looks better by that
Chaoyang             no image: pathologist A's label is the model's input, and B or C may be asked; C agrees with the label
                     on 99.6 to 99.9%, so that there is nearly nothing to be learned but to ask C

System accuracy is 1 - error; at a price of 0 the cost is the error.  one-vs-all, asymmetric softmax and RealizableSurrogate are
trained without knowing the price: where there is one, their fitted threshold alone knows it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.asking import BASELINES, METHODS, Asked, Task
from benchmarks.harness.cells import Cell
from benchmarks.harness.judging import Judged
from benchmarks.harness.running import Finding, Part, Run, image_options, options, running, settings_of
from benchmarks.harness.stage1 import Rows, first_stage
from deferral.datasets import chaoyang, cifar10h_counts, cifar10n_annotators, hate_speech
from deferral.experts import draw_answers, even_skill, random_annotator, random_person

TABLE = "people"
PRICES = (0.0, 0.05)
ONE_EXPERT = ("asymmetric softmax", "RealizableSurrogate")
LEARNED = (
    "compare-confidence",
    "post-hoc deferral",
    "single-stage mu=1",
    "one-vs-all",
    *ONE_EXPERT,
    "two-stage mu=1",
    "two-stage mu=1, weights of the sum",
)
SPLIT, PEOPLE_CHANGE, GROUPS, TWEETS, COLON = (
    "split of CIFAR-10H",
    "CIFAR-10N to 10H",
    "groups by class",
    "hate speech",
    "Chaoyang",
)
ALONE = 93.9  # the accuracy in % of the classifier of the bars
PUBLISHED = {  # (data, cost, method): error, from the system accuracies above
    (SPLIT, "price 0", "compare-confidence"): "2.30 ± 0.70",
    (SPLIT, "price 0", "RealizableSurrogate"): "2.50",
    (SPLIT, "price 0", "Chow, fitted threshold"): "2.70",
    (SPLIT, "price 0", "one-vs-all"): "3.05",
    (SPLIT, "price 0", "asymmetric softmax"): "3.10",
    (SPLIT, "price 0", "single-stage mu=1"): "3.70",
}
Parts = tuple[Asked, Asked, Asked]  # stage 2, calibration, test


def split_of_test_set(run: Run, seed: int) -> Parts:
    """All three parts are CIFAR-10H."""
    test = first_stage(run, "cifar10", seed).test
    counts = cifar10h_counts(run.data_root / "l2d")
    stage2, calibration, judged = _shares(test, (0.7, 0.1, 0.2), seed)
    person = partial(_person, counts)
    return person(stage2, 3 * seed), person(calibration, 3 * seed + 1), person(judged, 3 * seed + 2)


def people_change(run: Run, seed: int) -> Parts:
    """The heads learn from other people than those whom the threshold and the test are about."""
    first = first_stage(run, "cifar10", seed)
    people = run.data_root / "l2d"
    annotators, counts = cifar10n_annotators(people), cifar10h_counts(people)
    calibration, judged = _shares(first.test, (0.2, 0.8), seed)
    learned = random_annotator(annotators[first.stage2.numbers], seed=3 * seed).unsqueeze(-1)
    return Asked(first.stage2, learned), _person(counts, calibration, 3 * seed + 1), _person(counts, judged, 3 * seed + 2)


def groups_by_class(run: Run, seed: int) -> Parts:
    """Two groups of annotators, a confusion matrix each."""
    first = first_stage(run, "cifar10", seed)
    knows, guesses = even_skill(0.95, 10), even_skill(0.6, 10)
    animal = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 0]).bool().unsqueeze(-1)
    groups = torch.where(animal, knows, guesses), torch.where(animal, guesses, knows)

    def asked(rows: Rows, purpose: int) -> Asked:
        seeds = (2 * (3 * seed + purpose), 2 * (3 * seed + purpose) + 1)
        return Asked(
            rows, torch.stack([draw_answers(c, rows.labels, seed=s) for c, s in zip(groups, seeds, strict=True)], dim=-1)
        )

    return asked(first.stage2, 0), asked(first.calibration, 1), asked(first.test, 2)


def tweets(run: Run, seed: int) -> Parts:
    """Logistic regression on words and word pairs; the heads see its probabilities and 50 directions of the words."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = hate_speech(run.data_root / "l2d")
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    if run.preset.test_rows is not None:
        order = order[: 10 * run.preset.test_rows]
    classifier, *others = order.split(_sizes(len(order), (0.4, 0.2, 0.1, 0.3)))
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    seen = vectors.fit_transform([data.texts[i] for i in classifier.tolist()])
    model = LogisticRegression(C=10.0, max_iter=1000).fit(seen, data.labels[classifier].numpy())
    directions = TruncatedSVD(50, random_state=0).fit(seen)

    def asked(numbers: Tensor, purpose: int) -> Asked:
        words = vectors.transform([data.texts[i] for i in numbers.tolist()])
        features, scores = directions.transform(words), model.predict_log_proba(words)
        rows = Rows(numbers, data.labels[numbers], torch.from_numpy(features).float(), torch.from_numpy(scores).float())
        return _person(data.counts, rows, 3 * seed + purpose)

    stage2, calibration, judged = (asked(numbers, purpose) for purpose, numbers in enumerate(others))
    return stage2, calibration, judged


def colon(run: Run, seed: int) -> Parts:
    """The model's answer is the likeliest label given pathologist A's; the experts are B and C."""
    train, test = chaoyang(run.data_root / "l2d", train=True), chaoyang(run.data_root / "l2d", train=False)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    classifier, stage2, calibration = order.split(_sizes(len(order), (0.4, 0.4, 0.2)))
    pairs = 4 * train.annotators[classifier, 0] + train.labels[classifier]
    law = (torch.bincount(pairs, minlength=16).view(4, 4) + 1.0).log().log_softmax(dim=-1)

    def asked(source, numbers: Tensor) -> Asked:
        a = source.annotators[numbers, 0]
        return Asked(Rows(numbers, source.labels[numbers], F.one_hot(a, 4).float(), law[a]), source.annotators[numbers, 1:])

    return asked(train, stage2), asked(train, calibration), asked(test, torch.arange(len(test.labels)))


PROBLEMS: dict[str, tuple[Callable[[Run, int], Parts], int]] = {  # with the number of classes
    SPLIT: (split_of_test_set, 10),
    PEOPLE_CHANGE: (people_change, 10),
    GROUPS: (groups_by_class, 10),
    TWEETS: (tweets, 3),
    COLON: (colon, 4),
}
SEVERAL = (GROUPS, COLON)


def run_cells(run: Run, problems: Sequence[str]) -> None:
    """Every open cell of these problems."""
    cells = [
        Cell(TABLE, data, method, f"price {price:g}", seed, run.preset_name)
        for data in problems
        for seed in range(run.seeds)
        for price in PRICES
        for method in (*BASELINES, *LEARNED)
        if not (data in SEVERAL and method in ONE_EXPERT)
    ]

    @lru_cache(2)
    def parts(data: str, seed: int) -> Parts:
        return PROBLEMS[data][0](run, seed)

    @lru_cache(2)
    def task(data: str, seed: int, cost: str) -> tuple[Task, dict[str, Judged]]:
        price = float(cost.removeprefix("price "))
        made = Task(*parts(data, seed), price, PROBLEMS[data][1], seed, run.preset.head_steps)
        return made, made.baselines()

    def work(cell: Cell) -> Finding:
        made, references = task(cell.data, cell.seed, cell.cost)
        others = dict(references)
        judged = others.pop(cell.method) if cell.method in BASELINES else METHODS[cell.method](made)
        return Finding([Part(judged, others)])

    def settings(cell: Cell) -> dict[str, Any]:
        of_images = settings_of(run, "cifar10") if cell.data in (SPLIT, PEOPLE_CHANGE, GROUPS) else {}
        return {**of_images, "head_steps": run.preset.head_steps}

    run.each(cells, work, settings)


@click.command()
@options()
@image_options
@click.option("--data", type=click.Choice(list(PROBLEMS)), multiple=True, default=tuple(PROBLEMS), show_default=True)
def command(data: tuple[str, ...], **given) -> None:
    """Deferral to people on images, tweets and colon patches."""
    with running(**given) as run:
        run_cells(run, data)


def _person(counts: Tensor, rows: Rows, seed: int) -> Asked:
    return Asked(rows, random_person(counts[rows.numbers], seed=seed).unsqueeze(-1))


def _shares(rows: Rows, shares: Sequence[float], seed: int) -> list[Rows]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[chosen] for chosen in order.split(_sizes(len(rows), shares))]


def _sizes(total: int, shares: Sequence[float]) -> list[int]:
    sizes = [round(share * total) for share in shares[:-1]]
    return [*sizes, total - sum(sizes)]
