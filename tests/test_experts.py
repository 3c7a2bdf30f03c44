import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from deferral import error_costs
from deferral.experts import (
    draw_answers,
    draw_with_skill,
    drift,
    even_skill,
    fatigue,
    hide_answers,
    label_counts,
    majority,
    model_answers,
    perfect_on_first,
    perfect_up_to,
    random_annotator,
    random_person,
    skill_near,
    specialist,
)

ROWS = 20_000
# Five standard errors of a frequency over ROWS rows: one false alarm in two million checks.
TOLERANCE = 5 * 0.5 / math.sqrt(ROWS)
TARGETS = torch.arange(ROWS) % 4


def near(frequency: Tensor, law: Tensor | float, tolerance: float = TOLERANCE) -> bool:
    return bool(((frequency.double() - law).abs() <= tolerance).all())


def right(answers: Tensor, targets: Tensor = TARGETS) -> Tensor:
    return (answers == targets.unsqueeze(-1)).double()


def test_answers_follow_the_confusion_matrix() -> None:
    confusion = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    targets = torch.arange(3).repeat(ROWS)
    answers = draw_answers(confusion, targets, seed=0)
    assert near(torch.stack([torch.bincount(answers[targets == k], minlength=3) / ROWS for k in range(3)]), confusion)
    assert torch.equal(answers, draw_answers(confusion, targets, seed=0))
    assert not torch.equal(answers, draw_answers(confusion, targets, seed=1))
    assert draw_answers(confusion, targets[:0], seed=0).shape == (0,)
    assert draw_answers(confusion, targets[:1], seed=0).shape == (1,)


def test_a_matrix_per_group_of_rows() -> None:
    matrices = torch.stack([even_skill(0.9, 4), torch.eye(4).roll(1, dims=1), even_skill(0.25, 4)])
    groups = torch.arange(ROWS) // 4 % 3
    answers = draw_answers(matrices, TARGETS, seed=0, groups=groups)
    assert torch.equal(answers[groups == 1], (TARGETS[groups == 1] + 1) % 4)
    for group, accuracy in ((0, 0.9), (2, 0.25)):
        rows = groups == group
        assert near(right(answers[rows, None], TARGETS[rows]).mean(), accuracy, 2 * TOLERANCE)
    one = draw_answers(matrices[:1], TARGETS, seed=3, groups=torch.zeros_like(TARGETS))
    assert torch.equal(one, draw_answers(matrices[0], TARGETS, seed=3))


def test_both_conventions_of_k_and_of_a_guess() -> None:
    torch.testing.assert_close(even_skill(0.8, 3), torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]))
    expert = specialist([0, 2], 4)
    assert torch.equal(specialist(torch.tensor([0, 2, 2]), 4), expert)
    assert expert[0].tolist() == [1, 0, 0, 0]
    assert expert[1].tolist() == [0.25] * 4
    never = specialist([0, 2], 4, may_guess_right=False)
    torch.testing.assert_close(never[1], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]))
    for may_guess_right, chance in ((True, 1 / 10), (False, 0.0)):
        for k in range(11):
            matrix = perfect_on_first(k, 10, may_guess_right=may_guess_right)
            torch.testing.assert_close(matrix.sum(-1), torch.ones(10))
            torch.testing.assert_close(matrix.diagonal().mean(), torch.tensor((k + (10 - k) * chance) / 10))
            if k:
                assert torch.equal(matrix, perfect_up_to(k - 1, 10, may_guess_right=may_guess_right))


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8, 1.0])
def test_correlation_leaves_every_skill_as_it_is(correlation: float) -> None:
    skill = torch.tensor([0.9, 0.5, 0.5, 0.25])
    answers = draw_with_skill(skill, TARGETS, 4, seed=0, correlation=correlation)
    hit = right(answers)
    assert near(hit.mean(0), skill)
    both = (hit[:, 1] * hit[:, 2]).mean()
    assert near(both, 1 / 4 + math.asin(correlation) / (2 * math.pi))
    wrong = ((answers - TARGETS.unsqueeze(-1)) % 4)[:, 3]
    assert near(torch.bincount(wrong, minlength=4) / ROWS, torch.tensor([0.25] * 4))


def test_the_limits_of_correlation() -> None:
    skill = torch.tensor([0.8, 0.6, 0.6])
    independent = right(draw_with_skill(skill, TARGETS, 4, seed=1))
    for i, j in combinations(range(3), 2):
        assert near((independent[:, i] * independent[:, j]).mean(), skill[i] * skill[j])
    hit = right(draw_with_skill(skill, TARGETS, 4, seed=1, correlation=1.0))
    assert (hit[:, 0] >= hit[:, 1]).all()
    assert torch.equal(hit[:, 1], hit[:, 2])
    copies = draw_with_skill(skill, TARGETS, 4, seed=1, correlation=1.0, same_mistake=True)
    assert torch.equal(copies[:, 1], copies[:, 2])


def test_who_shares_mistakes_makes_the_same_one() -> None:
    skill = torch.tensor([0.4, 0.4])
    for same, agree in ((True, 1.0), (False, 1 / 3)):
        answers = draw_with_skill(skill, TARGETS, 4, seed=2, same_mistake=same)
        both_wrong = right(answers).sum(-1) == 0
        agreement = (answers[both_wrong, 0] == answers[both_wrong, 1]).double()
        assert near(agreement.mean(), agree, 5 * 0.5 / math.sqrt(len(agreement)))


def test_certain_skills_are_certain() -> None:
    answers = draw_with_skill(torch.tensor([[1.0, 0.0]]), TARGETS, 4, seed=0, correlation=0.5)
    assert right(answers).mean(0).tolist() == [1.0, 0.0]
    assert answers.min() == 0
    assert answers.max() == 3
    assert draw_with_skill(torch.tensor([0.5, 0.5]), TARGETS[:0], 4, seed=0).shape == (0, 2)
    assert draw_with_skill(torch.tensor([0.5]), TARGETS[:1], 2, seed=0).shape == (1, 1)


def test_draws_repeat_and_know_no_layout() -> None:
    skill = torch.rand(ROWS, 2).t().contiguous().t()
    for correlation in (0.0, 0.7):
        answers = draw_with_skill(skill, TARGETS, 4, seed=5, correlation=correlation)
        assert torch.equal(answers, draw_with_skill(skill.contiguous(), TARGETS, 4, seed=5, correlation=correlation))
        assert not torch.equal(answers, draw_with_skill(skill, TARGETS, 4, seed=6, correlation=correlation))


@pytest.mark.cuda
def test_a_seed_means_the_same_answers_on_every_device() -> None:
    skill, labels = torch.rand(ROWS, 3), torch.randint(-1, 4, (ROWS, 5))
    counts = torch.randint(1, 5, (ROWS, 4))
    calls: list[Callable[[str], Tensor]] = [
        lambda d: draw_answers(even_skill(0.7, 4).to(d), TARGETS.to(d), seed=0),
        lambda d: draw_with_skill(skill.to(d), TARGETS.to(d), 4, seed=0, correlation=0.5),
        lambda d: hide_answers(labels.to(d), 0.5, seed=0),
        lambda d: random_annotator(labels.to(d), seed=0),
        lambda d: random_person(counts.to(d), seed=0),
        lambda d: majority(label_counts(labels.to(d), 4), seed=0),
    ]
    for call in calls:
        assert call("cuda").device.type == "cuda"
        assert torch.equal(call("cuda").cpu(), call("cpu"))


def test_skill_that_depends_on_the_features() -> None:
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    points = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1e3, 1e3]])
    skill = skill_near(points, centres, width=2.0, near=0.9, far=0.3)
    by_hand = torch.tensor([[0, 9], [4, 13], [2e6, 2e6]]).double().div(-8).exp() * 0.6 + 0.3
    torch.testing.assert_close(skill, by_hand)
    torch.testing.assert_close(skill_near(points, centres[1], width=2.0, near=0.9, far=0.3), skill[:, 1:])
    features = points[torch.arange(ROWS) % 3]
    hit = right(draw_with_skill(skill_near(features, centres[0], width=2.0, near=0.9, far=0.3), TARGETS, 4, seed=0))
    assert near(hit.reshape(-1)[: 3 * (ROWS // 3)].reshape(-1, 3).mean(0), skill[:, 0], 2 * TOLERANCE)


def test_drift_and_fatigue() -> None:
    torch.testing.assert_close(drift(0.9, 0.5, 5), torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]]).double().T)
    tired = fatigue(torch.tensor([0.9, 0.4]), 0.4, 7, shift=3)
    assert tired.shape == (7, 2)
    torch.testing.assert_close(tired[:, 0], torch.tensor([0.9, 0.65, 0.4, 0.9, 0.65, 0.4, 0.9]).double())
    torch.testing.assert_close(tired[:, 1], torch.full((7,), 0.4).double())
    assert fatigue(0.8, 0.2, 3, shift=1).unique().tolist() == [0.8]
    assert drift(0.8, 0.2, 1).tolist() == [[0.8]]
    hit = right(draw_with_skill(fatigue(1.0, 0.0, ROWS, shift=2), TARGETS, 4, seed=0))
    assert hit.reshape(-1, 2).mean(0).tolist() == [1.0, 0.0]


def test_hidden_answers_are_missing_at_the_given_rates() -> None:
    answers = torch.randint(0, 4, (ROWS, 3))
    hidden = hide_answers(answers, torch.tensor([0.0, 0.3, 1.0]), seed=0)
    assert near((hidden == -1).double().mean(0), torch.tensor([0.0, 0.3, 1.0]))
    assert torch.equal(hidden[hidden != -1], answers[hidden != -1])
    per_row = hide_answers(answers, torch.arange(ROWS).unsqueeze(-1) % 2, seed=0)
    assert (per_row[1::2] == -1).all()
    assert torch.equal(per_row[::2], answers[::2])
    _, mask = error_costs(hidden, TARGETS, missing=-1)
    assert torch.equal(mask, hidden >= 0)
    assert torch.equal(hide_answers(hidden, 0.0, seed=1), hidden)
    # With one seed for everything, who is absent is still no matter of who is right.
    together = draw_with_skill(torch.tensor([0.6, 0.8]), torch.zeros(ROWS, dtype=torch.int64), 10, seed=0, correlation=0.9)[:, 0]
    shown = hide_answers(together, 0.3, seed=0) >= 0
    assert abs((together[shown] == 0).double().mean() - 0.6) < 4 * 0.5 / ROWS**0.5
    real = hide_answers(torch.ones(ROWS), 0.25, seed=0)
    assert near(real.isnan().double().mean(), 0.25)


def test_a_random_annotator_is_one_of_those_who_answered() -> None:
    labels = torch.tensor([[3, -1, -1], [-1, -1, -1], [1, 2, -1]]).repeat(3000, 1)
    answers = random_annotator(labels, seed=0).reshape(-1, 3)
    assert (answers[:, 0] == 3).all()
    assert (answers[:, 1] == -1).all()
    assert near((answers[:, 2] == 1).double().mean(), 0.5, 2.5 / math.sqrt(3000))


def test_a_random_person_follows_the_counts() -> None:
    answers = random_person(torch.tensor([[9, 1, 0]]).repeat(5000, 1), seed=0)
    assert near((answers == 0).double().mean(), 0.9, 2.5 / math.sqrt(5000))
    assert not (answers == 2).any()


def test_the_majority_wins_and_ties_are_fair() -> None:
    labels = torch.tensor([[2, 2, 0], [0, 1, -1], [-1, -1, -1], [1, -1, -1], [0, 1, 2]]).repeat(4000, 1)
    counts = label_counts(labels, 3)
    assert counts[:5].tolist() == [[1, 0, 2], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    answers = majority(counts, seed=0).reshape(-1, 5)
    assert [answers[:, i].unique().tolist() for i in (0, 2, 3)] == [[2], [-1], [1]]
    for column, tied in ((1, 2), (4, 3)):
        assert near(torch.bincount(answers[:, column]) / 4000, 1 / tied, 2.5 / math.sqrt(4000))
    assert torch.equal(majority(counts, seed=0), majority(counts / 7, seed=0))
    # Who follows the majority of one annotator follows that annotator.
    assert torch.equal(majority(label_counts(labels[:, :1], 3), seed=0), labels[:, 0])
    assert torch.equal(label_counts(labels[:5].to(torch.int8), 3), counts[:5])


def test_the_majority_of_independent_experts_is_as_good_as_condorcet_says() -> None:
    answers = draw_with_skill(torch.tensor([0.7, 0.7, 0.7]), TARGETS % 2, 2, seed=4)
    voted = majority(label_counts(answers, 2), seed=0)
    assert near((voted == TARGETS % 2).double().mean(), 0.7**3 + 3 * 0.7**2 * 0.3)


class Half(nn.Module):
    """Scores that show in which mode, and with or without gradient, they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.linear = nn.Linear(3, 3)
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled()))
        return self.linear(self.frozen(self.drop(x)))


def test_any_model_is_an_expert() -> None:
    model, x = Half(), torch.randn(10, 3)
    with torch.no_grad():
        expected = model.eval()(x).argmax(-1)
    model.train().frozen.eval()
    model.asked.clear()
    answers = model_answers(model, x.split(4))
    assert torch.equal(answers, expected)
    assert model.asked == [(False, False)] * 3
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, expected), batch_size=3)
    assert torch.equal(model_answers(model, loader), expected)
    assert torch.equal(model_answers(lambda v: v, [x]), x.argmax(-1))
    half = torch.tensor([[1.0, 1.0, 0.0], [-torch.inf, 0.0, -torch.inf]], dtype=torch.float16)
    assert model_answers(nn.Identity(), [half], device="cpu").tolist() == [1, 1]


def test_a_model_that_fails_gets_its_modes_back() -> None:
    model = Half().train()
    model.linear.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="row 0 of batch 0"):
        model_answers(model, [torch.zeros(2, 3)])
    assert model.training
    assert model.drop.training
    assert torch.is_grad_enabled()


@pytest.mark.cuda
def test_a_model_answers_where_it_lives() -> None:
    model = Half().cuda()
    assert model_answers(model, [torch.randn(4, 3)]).device.type == "cuda"


MATRIX, LONG = torch.eye(2), torch.zeros(3, dtype=torch.long)
SKILL, FEATURES = torch.tensor([0.5, 0.5]), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: even_skill(1.2, 3), ValueError, "probability"),
        (lambda: even_skill(0.5, 1), ValueError, "at least 2"),
        (lambda: specialist([3], 3), ValueError, r"in 0\.\.2"),
        (lambda: specialist([-1], 3), ValueError, r"in 0\.\.2"),
        (lambda: specialist([True, False, True], 3), TypeError, "got True or False"),
        (lambda: specialist(torch.tensor([True, False]), 3), TypeError, "got True or False"),
        (lambda: perfect_on_first(4, 3), ValueError, r"0\.\.3, got 4"),
        (lambda: perfect_up_to(3, 3), ValueError, r"0\.\.2, got 3"),
        (lambda: draw_answers(torch.ones(2, 2), LONG, seed=0), ValueError, "sum to 1"),
        (lambda: draw_answers(torch.full((2, 2), torch.nan), LONG, seed=0), ValueError, "sum to 1"),
        (lambda: draw_answers(torch.ones(2, 3) / 3, LONG, seed=0), ValueError, r"shape \(K, K\), got \(2, 3\)"),
        (lambda: draw_answers(torch.ones(2, 2, 2) / 2, LONG, seed=0), ValueError, "pass `groups`"),
        (lambda: draw_answers(MATRIX.double(), torch.tensor([0, -1]), seed=0), ValueError, r"in 0\.\.1, got -1"),
        (lambda: draw_answers(MATRIX, LONG.float(), seed=0), TypeError, "int64, got torch.float32"),
        (lambda: draw_answers(MATRIX, LONG.bool(), seed=0), TypeError, "int64, got torch.bool"),
        (lambda: draw_answers(MATRIX, LONG[None], seed=0), ValueError, "one index per row"),
        (lambda: draw_answers(MATRIX[None], LONG, groups=LONG + 1, seed=0), ValueError, r"groups: .* 0\.\.0, got 1"),
        (lambda: draw_answers(MATRIX[None], LONG, groups=LONG[:2], seed=0), ValueError, "groups: expected one per row"),
        (lambda: draw_with_skill(SKILL + 1, LONG, 3, seed=0), ValueError, r"in \[0, 1\], got 1\.5"),
        (lambda: draw_with_skill(SKILL * torch.nan, LONG, 3, seed=0), ValueError, "got nan"),
        (lambda: draw_with_skill(torch.rand(3), LONG, 3, seed=0), ValueError, r"skill\.unsqueeze\(-1\)"),
        (lambda: draw_with_skill(torch.rand(2, 2), LONG, 3, seed=0), ValueError, r"got shape \(2, 2\)"),
        (lambda: draw_with_skill(LONG[:2], LONG, 3, seed=0), TypeError, "floating"),
        (lambda: draw_with_skill(SKILL, LONG + 3, 3, seed=0), ValueError, r"0\.\.2, got 3"),
        (lambda: draw_with_skill(SKILL, LONG, 1, seed=0), ValueError, "at least 2"),
        (lambda: draw_with_skill(SKILL, LONG, 3, seed=0, correlation=-0.1), ValueError, "correlation"),
        (lambda: skill_near(FEATURES, torch.zeros(3), width=1.0, near=1.0, far=0.0), ValueError, "flatten"),
        (lambda: skill_near(FEATURES, torch.zeros(2), width=0.0, near=1.0, far=0.0), ValueError, "positive"),
        (lambda: skill_near(FEATURES, torch.zeros(2), width=1.0, near=1.5, far=0.0), ValueError, r"got 1\.5"),
        (lambda: drift(0.5, 1.5, 3), ValueError, r"got 1\.5"),
        (lambda: drift(0.5, 0.5, 0), ValueError, "num_rows"),
        (lambda: fatigue(0.5, 0.5, 3, shift=0), ValueError, "shift"),
        (lambda: fatigue(torch.rand(2, 2), 0.5, 3, shift=1), ValueError, r"one per expert \(E,\)"),
        (lambda: hide_answers(LONG, 1.1, seed=0), ValueError, r"got 1\.1"),
        (lambda: hide_answers(LONG, torch.rand(2), seed=0), ValueError, "broadcasts"),
        (lambda: hide_answers(LONG, torch.rand(2, 3), seed=0), ValueError, "broadcasts"),
        (lambda: hide_answers(LONG.to(torch.uint8), 0.5, seed=0), TypeError, "uint8; use answers.long"),
        (lambda: random_annotator(LONG, seed=0), ValueError, "one column per annotator"),
        (lambda: random_annotator(LONG[:, None].float(), seed=0), TypeError, "integer dtype"),
        (lambda: label_counts(LONG[:, None] + 3, 3), ValueError, r"0\.\.2 or -1, got 3"),
        (lambda: random_person(torch.zeros(3, 2), seed=0), ValueError, "at least one person"),
        (lambda: random_person(torch.tensor([[1.0, torch.nan]]), seed=0), ValueError, "NaN"),
        (lambda: majority(torch.tensor([[2, -1]]), seed=0), ValueError, "negative"),
        (lambda: majority(LONG, seed=0), ValueError, r"\(N, K\)"),
        (lambda: draw_answers(torch.eye(3), ["a"], seed=0), TypeError, "targets: expected a torch tensor, or numbers"),
        (lambda: draw_answers(None, LONG, seed=0), TypeError, "confusion: expected a torch tensor, or numbers"),
        (lambda: random_annotator("a", seed=0), TypeError, "labels: expected a torch tensor, or numbers"),
        (lambda: majority({}, seed=0), TypeError, "counts: expected a torch tensor, or numbers"),
        (lambda: majority(LONG[:, None], seed=0.5), TypeError, r"seed: expected a whole number, got 0\.5"),
        (lambda: even_skill("a", 3), TypeError, "accuracy: expected a number, got 'a'"),
        (lambda: specialist(1, 3), TypeError, "classes: expected indices of classes, got 1"),
        (lambda: specialist([0.5], 3), TypeError, r"classes: expected a whole number, got 0\.5"),
        (lambda: model_answers(nn.Identity(), []), ValueError, "at least one batch"),
        (lambda: model_answers(nn.Identity(), [torch.rand(2, 1)]), ValueError, r"the pair \[0, z\]"),
        (lambda: model_answers(nn.Identity(), [torch.rand(2)]), ValueError, r"shape \(2, K\)"),
        (lambda: model_answers(nn.Identity(), [torch.tensor([[0.0, 1.0], [0.0, torch.inf]])]), ValueError, "row 1 of batch 0"),
        (lambda: model_answers(nn.Identity(), [torch.full((1, 2), -torch.inf)]), ValueError, "finite"),
        (lambda: model_answers(lambda x: {"logits": x}, [FEATURES]), TypeError, r"model\(x\)\.logits"),
        (lambda: model_answers(nn.Identity(), [{"x": FEATURES}]), TypeError, "batches: .* got dict"),
    ],
)
def test_bad_input(call: Callable[[], Tensor], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
