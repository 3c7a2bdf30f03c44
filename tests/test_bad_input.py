"""Bad input to losses: what was expected, what came, what to do."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from deferral import Criterion, chow_scores, decide_pair, deferral_margin, error_costs, losses, pick, squared_costs
from deferral.losses import (
    asymmetric_softmax,
    comp_sum,
    cost_sensitive_abstention,
    learned_loss,
    madras,
    max_margin,
    mixture_of_experts,
    mozannar_sontag,
    one_vs_all,
    picce,
    predictor_rejector_abstention,
    realizable_deferral,
    realizable_experts,
    realizable_router,
    realizable_surrogate,
    regression_abstention,
    regression_deferral,
    rejector_of_scores,
    score_based_abstention,
    selective_net,
    single_stage_deferral,
    two_stage_abstention,
    two_stage_deferral,
)
from deferral.losses.margin import rho_hinge, rho_margin, sigmoid
from deferral.losses.predictor_rejector import constrained_rho_hinge, double_mae, mae
from deferral.validation import check_costs, check_mask, check_scores, check_targets

SCORES = torch.randn(4, 5)
TARGETS = torch.tensor([0, 1, 2, 0])
COSTS = torch.linspace(0.1, 0.9, 8).view(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: score_based_abstention(SCORES.long(), TARGETS, 0.1), TypeError, "floating dtype, got torch.int64"),
        (lambda: score_based_abstention([[1.0]], TARGETS, 0.1), TypeError, "torch tensor, got list"),
        (lambda: score_based_abstention(SCORES, TARGETS[:3], 0.1), ValueError, r"shape (4,) for scores (4, 5), got torch.int64"),
        (lambda: score_based_abstention(torch.randn(2, 5, 2), TARGETS.view(2, 2), 0.1), ValueError, "scores.movedim(1, -1)"),
        (lambda: score_based_abstention(SCORES, torch.rand(4, 5), 0.1), ValueError, "probabilities (..., K) of shape (4, 4)"),
        (lambda: score_based_abstention(SCORES, TARGETS.float(), 0.1), ValueError, "integer targets are indices"),
        (lambda: score_based_abstention(SCORES, TARGETS, 1.5), ValueError, "number in [0, 1]"),
        (lambda: score_based_abstention(SCORES, TARGETS, torch.rand(3)), ValueError, "differ in rows"),
        (lambda: score_based_abstention(SCORES[:, :1], TARGETS, 0.1), ValueError, "leave 0 columns for classes"),
        (lambda: single_stage_deferral(SCORES, TARGETS, torch.rand(3, 2)), ValueError, "differ in rows"),
        (lambda: single_stage_deferral(SCORES, TARGETS, torch.rand(4, 6)), ValueError, "leave -1 columns for classes"),
        (lambda: single_stage_deferral(SCORES, TARGETS, COSTS, mask=torch.ones(4, 2)), TypeError, "mask.bool()"),
        (
            lambda: single_stage_deferral(SCORES, TARGETS, COSTS, mask=torch.ones(4, 6).bool()),
            ValueError,
            "expected 2 columns (experts) or 5 (actions)",
        ),
        (lambda: two_stage_deferral(SCORES, torch.rand(4, 4)), ValueError, "did you leave out the own predictor"),
        (lambda: two_stage_deferral(SCORES, torch.rand(3, 5)), ValueError, "differ in rows"),
        (lambda: comp_sum(SCORES, torch.rand(4, 5), mu=2.5), ValueError, "mu: expected a number in [0, 2]"),
        (lambda: two_stage_abstention(torch.randn(4, 1), torch.ones(4), 0.1), ValueError, "squeeze(-1)"),
        (lambda: two_stage_abstention(torch.randn(4), torch.ones(4), -0.1), ValueError, "number in [0, 1]"),
        (lambda: two_stage_abstention(torch.randn(4), [1.0, 0.0, 1.0, 0.0], 0.1), TypeError, "wrong: expected a torch tensor"),
        (lambda: two_stage_abstention(torch.randn(4), torch.ones(4), torch.rand(4, 1)), ValueError, "differ in rows"),
        (lambda: predictor_rejector_abstention(SCORES, SCORES[:1, 0], TARGETS, 0.1), ValueError, "one rejector value per row"),
        (lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, torch.rand(4, 1)), ValueError, "differ in rows"),
        (lambda: predictor_rejector_abstention(SCORES.long(), SCORES[:, 0], TARGETS, 0.1), TypeError, "floating"),
        (lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, beta=0.0), ValueError, "positive"),
        (lambda: single_stage_deferral(SCORES, TARGETS.byte(), COSTS), TypeError, "targets.long()"),
        (lambda: single_stage_deferral(SCORES, TARGETS, COSTS.tolist()), TypeError, "expert_costs: expected a torch tensor"),
        (lambda: single_stage_deferral(SCORES, TARGETS, COSTS, mask=torch.ones(4, 1).bool()), ValueError, "expected 2 columns"),
        (lambda: two_stage_deferral(SCORES, torch.ones(4, 5).bool()), TypeError, "costs: expected a floating dtype"),
        (lambda: two_stage_deferral(SCORES, torch.rand(4, 5), ceiling=torch.ones(4)), ValueError, "keepdim=True"),
        (
            lambda: two_stage_deferral(SCORES, torch.rand(4, 5), mask=torch.ones(4, 3).bool()),
            ValueError,
            "4 columns (experts) or 5",
        ),
        (
            lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, base=F.cross_entropy),
            ValueError,
            "cross_entropy is inconsistent with every cost transform",
        ),
        (
            lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, base=double_mae, psi=1.0),
            ValueError,
            "consistent with psi=2 only, got 1",
        ),
        (
            lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, base=constrained_rho_hinge, psi=1.0),
            ValueError,
            "psi=5 only",
        ),
        (
            lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, phi=sigmoid, alpha=2.0),
            ValueError,
            "with alpha=2 and beta=1 the psi of a convex phi, 2, is inconsistent for a bounded one",
        ),
        (lambda: regression_abstention(SCORES[:, 0], SCORES[:, 1], torch.rand(4, 1)), ValueError, "rejector and cost differ"),
        (lambda: regression_abstention(SCORES[:, 0], SCORES[:, 1], math.nan), ValueError, "non-negative number"),
        (lambda: regression_deferral(SCORES[:, 0], SCORES, torch.rand(2, 4, 4)), ValueError, "scores and expert_costs differ"),
        (lambda: realizable_deferral(SCORES, TARGETS, TARGETS == 0), TypeError, "expert_cost: expected a floating dtype"),
        (lambda: max_margin(SCORES[:, :1], SCORES[:, :1]), ValueError, "at least two actions"),
        (lambda: single_stage_deferral(SCORES, TARGETS, COSTS, ceiling=0.5), ValueError, "at least 1, the cost of a wrong class"),
        (lambda: single_stage_deferral(SCORES, TARGETS, COSTS, ceiling=1 + COSTS[:, :1]), ValueError, "a number of at least 1"),
        (lambda: two_stage_deferral(SCORES, torch.rand(4, 5), ceiling=math.nan), ValueError, "a number >= 0, got nan"),
        (lambda: two_stage_deferral(SCORES, torch.rand(4, 5), ceiling=torch.ones(3, 1)), ValueError, "scores and ceiling differ"),
        (lambda: max_margin(SCORES, SCORES.abs(), phi=partial(rho_margin, rho=-1.0)), ValueError, "a margin above 0, got -1.0"),
        (lambda: rho_hinge(SCORES, rho=0.0), ValueError, "a margin above 0, got 0.0"),
        (lambda: mozannar_sontag(SCORES, TARGETS, COSTS[:, 0], alpha=-1.0), ValueError, "alpha: expected a number in [0, 1]"),
        (lambda: realizable_surrogate(SCORES, TARGETS, COSTS[:, 0], alpha=2.0), ValueError, "alpha: expected a number in [0, 1]"),
        (lambda: selective_net(*COSTS.T, COSTS[:, 0], coverage=0.9, penalty=-1.0), ValueError, "penalty: expected a number >= 0"),
        (lambda: score_based_abstention(SCORES, TARGETS, [0.1] * 4), TypeError, "a number or a torch tensor, got list"),
        (lambda: one_vs_all(SCORES, TARGETS, [1.0]), TypeError, "expert_correct: expected a torch tensor, got list"),
        (lambda: mozannar_sontag(SCORES, TARGETS, [1.0]), TypeError, "expert_correct: expected a torch tensor, got list"),
        (lambda: two_stage_deferral(SCORES, (COSTS, COSTS > 0)), TypeError, "(costs, mask): pass the two one by one"),
        (
            lambda: regression_abstention(COSTS[:, 0], SCORES[:, 0], [0.1] * 4),
            TypeError,
            "cost: expected a torch tensor, got list",
        ),
        (lambda: regression_abstention(0.3, SCORES[:, 0], 0.1), TypeError, "predictor_loss: expected a torch tensor, got float"),
        (
            lambda: regression_deferral(torch.rand(4, 1), SCORES[:, :3], COSTS),
            ValueError,
            "of a prediction (..., 1) take .squeeze(-1) before",
        ),
        (lambda: regression_deferral(torch.rand(()), SCORES[:, :3], COSTS), ValueError, "needs reduction='none'"),
        (
            lambda: error_costs(["a"], TARGETS),
            TypeError,
            "answers: expected a torch tensor, or numbers that NumPy",
        ),
        (lambda: error_costs(TARGETS, TARGETS), ValueError, "answers: expected shape (4, A), one column per expert, got (4,)"),
        (lambda: squared_costs(COSTS, ["a"] * 4), TypeError, "targets: expected a torch tensor, or numbers"),
        (lambda: rejector_of_scores(SCORES[:, :1]), ValueError, "class scores and the score of abstaining"),
        (lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, alpha=0.0), ValueError, "positive"),
        (lambda: picce(SCORES, TARGETS, COSTS[:3]), ValueError, "scores and expert_correct differ in rows"),
        (lambda: cost_sensitive_abstention([[1.0]], TARGETS, 0.1), TypeError, "scores: expected a torch tensor, got list"),
        (lambda: realizable_router(SCORES, COSTS), ValueError, "did you leave out the own predictor's column"),
        (
            lambda: regression_deferral(COSTS[:, 0], SCORES[:, :3], COSTS > 0),
            TypeError,
            "expert_costs: expected a floating dtype",
        ),
        (lambda: chow_scores(10 * SCORES, 0.1), ValueError, "are they raw scores?  Pass scores.softmax(-1)"),
        (lambda: madras(SCORES.long(), SCORES[:, 0], TARGETS, COSTS[:, 0]), TypeError, "floating dtype, got torch.int64"),
        (lambda: mixture_of_experts(SCORES.long(), SCORES[:, :3], TARGETS, COSTS), TypeError, "floating dtype, got torch.int64"),
        (lambda: learned_loss(SCORES[:, 0], SCORES[:, 0].numpy()), TypeError, "predictor_loss: expected a torch tensor, got nd"),
        (lambda: selective_net([0.1], *COSTS.T, coverage=0.9), TypeError, "losses: expected a torch tensor, got list"),
        (lambda: selective_net(*COSTS.T, TARGETS, coverage=0.9), TypeError, "auxiliary_losses: expected a floating dtype"),
        (lambda: max_margin(SCORES.tolist(), SCORES), TypeError, "scores: expected a torch tensor, got list"),
        (lambda: losses.expert_correctness(SCORES.long(), 3), TypeError, "scores: expected a floating dtype"),
        (lambda: decide_pair("a", SCORES[:, 0]), TypeError, "scores: expected a torch tensor, or numbers"),
        (lambda: deferral_margin(None, num_own=1), TypeError, "scores: expected a torch tensor, or numbers"),
        (lambda: pick({}, TARGETS), TypeError, "table: expected a torch tensor, or numbers"),
        (lambda: pick(SCORES, [None] * 4), TypeError, "actions: expected a torch tensor, or numbers"),
        (lambda: two_stage_deferral(SCORES, SCORES.abs(), mu="1"), TypeError, "mu: expected a number, got '1'"),
        (lambda: two_stage_deferral(SCORES, SCORES.abs(), ceiling=None), TypeError, "ceiling: expected a number, got None"),
        (lambda: single_stage_deferral(SCORES, TARGETS, COSTS, ceiling="1"), TypeError, "ceiling: expected a number, got '1'"),
        (lambda: score_based_abstention(SCORES, TARGETS, None), TypeError, "cost: expected a number, got None"),
        (lambda: score_based_abstention(SCORES, TARGETS, True), TypeError, "cost: expected a number, got True"),
        (lambda: regression_abstention(COSTS[:, 0], SCORES[:, 0], 1j), TypeError, "cost: expected a number, got 1j"),
        (lambda: mozannar_sontag(SCORES, TARGETS, COSTS[:, 0], alpha="a"), TypeError, "alpha: expected a number, got 'a'"),
        (lambda: realizable_deferral(SCORES, TARGETS, COSTS[:, 0], q=[1.0]), TypeError, "q: expected a number, got list"),
        (lambda: losses.deep_gamblers(SCORES, TARGETS, reward="2"), TypeError, "reward: expected a number, got '2'"),
        (lambda: selective_net(*COSTS.T, COSTS[:, 0], coverage="a"), TypeError, "coverage: expected a number, got 'a'"),
        (
            lambda: selective_net(*COSTS.T, COSTS[:, 0], coverage=0.9, penalty=None),
            TypeError,
            "penalty: expected a number",
        ),
        (
            lambda: predictor_rejector_abstention(SCORES, SCORES[:, 0], TARGETS, 0.1, alpha="a"),
            TypeError,
            "alpha: expected a number, got 'a'",
        ),
        (lambda: losses.expert_correctness(SCORES, 3.0), TypeError, "num_classes: expected a whole number, got 3.0"),
        (lambda: losses.expert_correctness(SCORES, 3, mu="a"), TypeError, "mu: expected a number, got 'a'"),
        (lambda: one_vs_all(torch.tensor(1.0), TARGETS, COSTS), ValueError, "scores: expected a column for every action"),
        (
            lambda: regression_deferral(COSTS[:, 0], SCORES[:, :3], torch.tensor(1.0)),
            ValueError,
            "expert_costs: expected a col",
        ),
        (
            lambda: mixture_of_experts(SCORES, torch.tensor(1.0), TARGETS, COSTS),
            ValueError,
            "gate: expected a column for every action",
        ),
    ],
)
def test_shapes_dtypes_and_pairings(call, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        call()


def test_the_consistent_psi_may_be_named() -> None:
    r = SCORES[:, 0]
    explicit = predictor_rejector_abstention(SCORES, r, TARGETS, 0.1, base=mae, psi=2.0, alpha=2.0)
    torch.testing.assert_close(explicit, predictor_rejector_abstention(SCORES, r, TARGETS, 0.1, base=mae, alpha=2.0))


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_k_is_an_error_and_never_reads_the_abstain_column(label: int) -> None:
    wrong, right = torch.tensor([0, 1, 2, label]), torch.ones(4)
    for call in (
        lambda: score_based_abstention(SCORES, wrong, 0.1),
        lambda: losses.cost_sensitive_abstention(SCORES[:, :4], wrong, 0.1),
        lambda: single_stage_deferral(SCORES, wrong, right[:, None]),
        lambda: single_stage_deferral(SCORES, wrong, right[:, None], ceiling=1.5),
        lambda: losses.one_vs_all(SCORES, wrong, right[:, None]),
        lambda: losses.picce(SCORES, wrong, right[:, None]),
        lambda: losses.realizable_experts(SCORES, wrong, right[:, None]),
        lambda: losses.mozannar_sontag(SCORES, wrong, right),
        lambda: losses.asymmetric_softmax(SCORES, wrong, right),
        lambda: losses.deep_gamblers(SCORES, wrong, reward=2.0),
        lambda: mae(SCORES[:, :4], wrong),
        lambda: losses.madras(SCORES[:, :4], SCORES[:, 4], wrong, right),
    ):
        with pytest.raises((IndexError, RuntimeError)):
            call()


def test_one_number_meets_scores_on_another_device_and_a_table_does_not() -> None:
    scores = torch.empty(4, 5, device="meta")
    targets = torch.empty(4, dtype=torch.int64, device="meta")
    assert two_stage_deferral(scores, scores, ceiling=torch.tensor(1.5)).shape == (4,)
    assert score_based_abstention(scores, targets, torch.tensor(0.05)).shape == (4,)
    assert losses.cost_sensitive_abstention(scores, targets, torch.tensor(0.05)).shape == (4,)
    with pytest.raises(RuntimeError, match="device"):
        score_based_abstention(scores, targets, torch.full((4,), 0.05))


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((SCORES, torch.tensor([0, 1, 2, 4])), {"cost": 0.1}, "class indices in 0..3, got 4 at index [3]"),
        ((SCORES, torch.tensor([0, -1, 2, 3])), {"cost": 0.1}, "got -1 at index [1]"),
        ((SCORES, torch.full((4, 4), 0.5)), {"cost": 0.1}, "sum to 1"),
        ((SCORES.clone().fill_(torch.nan), TARGETS), {"cost": 0.1}, "got nan at index [0, 0] and 19 more"),
        ((SCORES, TARGETS), {"cost": torch.full((4,), torch.nan)}, "cost: expected numbers, got NaN in 4 places"),
    ],
)
def test_criterion_validates_values(arguments, options, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Criterion(score_based_abstention, **options)(*arguments)


def test_criterion_is_the_mean_and_validation_can_be_switched_off() -> None:
    expected = single_stage_deferral(SCORES, TARGETS, COSTS).mean()
    torch.testing.assert_close(Criterion(single_stage_deferral)(SCORES, TARGETS, COSTS), expected)
    dear = COSTS + 0.5
    with pytest.raises(ValueError, match=r"Pass ceiling=1\.\d+ .*here and to the loss"):
        Criterion(single_stage_deferral)(SCORES, TARGETS, dear)
    for costs in (torch.zeros(*COSTS.shape[:-1], SCORES.shape[-1] + 2), COSTS[..., 0]):
        with pytest.raises(ValueError, match=r"columns for classes|one column per expert"):
            Criterion(single_stage_deferral)(SCORES, TARGETS, costs)
    Criterion(single_stage_deferral, ceiling=1.5)(SCORES, TARGETS, dear)
    Criterion(single_stage_deferral, validate=False)(SCORES, TARGETS, dear)
    assert "mu=1.7, validate=True" in repr(Criterion(single_stage_deferral, mu=1.7))


def test_criterion_takes_a_loss_from_elsewhere_whose_every_column_is_a_class() -> None:
    labels = torch.tensor([0, 4, 2, 3])

    def own(scores: torch.Tensor, targets: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores, targets, reduction="none", ignore_index=ignore_index)

    torch.testing.assert_close(Criterion(own)(SCORES, labels), own(SCORES, labels).mean())
    with pytest.raises(ValueError, match=r"class indices in 0\.\.4, got 5"):
        Criterion(own)(SCORES, labels + 1)


def test_criterion_takes_no_mean_of_a_mean_where_rows_are_ignored() -> None:
    def mean(scores: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        return F.cross_entropy(scores, targets, ignore_index=ignore_index)

    with pytest.raises(ValueError, match=re.escape("loss: expected one value per row, shape (4,), so that ignored")):
        Criterion(mean)(SCORES, TARGETS)


def test_criterion_takes_a_loss_that_flattens_its_rows() -> None:
    def flat(scores: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none")

    targets = torch.tensor([[0, -100], [2, 1]])
    expected = F.cross_entropy(SCORES, targets.flatten())
    torch.testing.assert_close(Criterion(flat)(SCORES.view(2, 2, 5), targets), expected)


def test_criterion_checks_two_stage_costs_and_masks() -> None:
    costs, experts_known = torch.rand(4, 3), torch.ones(4, 2, dtype=torch.bool)
    Criterion(two_stage_deferral, ceiling=costs.sum(-1, keepdim=True))(SCORES[:, :3], costs)
    Criterion(two_stage_deferral)(SCORES[:, :3], costs, mask=experts_known)
    with pytest.raises(ValueError, match="own action"):
        Criterion(two_stage_deferral)(SCORES[:, :3], costs, mask=torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        Criterion(two_stage_deferral)(SCORES[:, :3], costs * torch.nan, mask=experts_known)
    with pytest.raises(ValueError, match="above the ceiling by"):
        Criterion(two_stage_deferral, ceiling=torch.tensor(1.0))(SCORES[:, :3], 9 * costs)
    # What is not known says nothing of what is.
    unknown, known = (9 * costs).index_fill(-1, torch.tensor([1]), torch.nan), torch.tensor([True, False, True])
    with pytest.raises(ValueError, match="above the ceiling by"):
        Criterion(two_stage_deferral, ceiling=torch.ones(4, 1))(SCORES[:, :3], unknown, mask=known.expand(4, 3))
    with pytest.raises(ValueError, match="wrong: expected 1 where the predictor is wrong"):
        Criterion(two_stage_abstention, cost=0.1)(SCORES[:, 0], torch.tensor([0.0, 1.0, 7.0, 0.0]))
    assert "partial" in repr(Criterion(partial(two_stage_deferral, mu=1.7)))
    with pytest.raises(TypeError, match="no option named margin"):
        Criterion(two_stage_deferral, margin=1)


def test_criterion_leaves_the_costs_of_regression_open_above() -> None:
    error, dear = SCORES[:, 0].square(), 3 * torch.ones(4, 4)
    Criterion(regression_deferral)(error, SCORES, dear)
    Criterion(regression_abstention)(error, SCORES[:, 1], dear[:, 0])
    with pytest.raises(ValueError, match="predictor_loss: expected finite numbers"):
        Criterion(regression_deferral)(error * torch.nan, SCORES, dear)
    with pytest.raises(ValueError, match="own action"):
        Criterion(regression_deferral)(error, SCORES, dear, mask=torch.zeros(4, 5, dtype=torch.bool))


def test_criterion_refuses_a_mask_of_the_own_actions() -> None:
    none = torch.zeros(4, 5, dtype=torch.bool)
    for loss in (single_stage_deferral, one_vs_all):
        with pytest.raises(ValueError, match=r"own actions \(first 3\) can always be taken"):
            Criterion(loss)(SCORES, TARGETS, COSTS.round(), mask=none)
    with pytest.raises(ValueError, match=r"own action \(first 1\)"):
        Criterion(mixture_of_experts)(SCORES[:, :3], SCORES[:, :3], TARGETS, COSTS.round(), mask=none[:, :3])


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (mozannar_sontag, (SCORES[:, :4], TARGETS, COSTS[:, 0].round())),
        (asymmetric_softmax, (SCORES[:, :4], TARGETS, COSTS[:, 0] > 0.5)),
        (realizable_deferral, (SCORES[:, :4], TARGETS, COSTS[:, 0])),
        (madras, (SCORES[:, :4], SCORES[:, 4], TARGETS, COSTS[:, 0])),
        (mixture_of_experts, (SCORES[:, :3], SCORES[:, :4], TARGETS, SCORES[:, :3] > 0)),
        (comp_sum, (SCORES[:, :4], torch.rand(4, 4))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_criterion_does_not_take_a_mask_as_long_as_the_scores_are_wide_for_one_of_actions(loss, arguments) -> None:
    """Four rows, or as many experts as classes: the mask's last axis is as long as that of the scores."""
    missing = torch.tensor([False, True, True, True])
    missing = missing[:3].expand(4, 3) if loss is mixture_of_experts else missing
    torch.testing.assert_close(Criterion(loss)(*arguments, mask=missing), loss(*arguments, mask=missing).mean())


def test_criterion_checks_what_is_said_of_experts() -> None:
    of_answers = "expert_correct: expected 1 where the expert was right"
    for loss, said in ((mozannar_sontag, of_answers), (realizable_deferral, "expert_cost: the largest is 2")):
        with pytest.raises(ValueError, match=said):
            Criterion(loss)(SCORES[:, :4], TARGETS, torch.tensor([0.0, 2.0, 0.0, 1.0]))
        unknown = torch.tensor([0.0, torch.nan, 0.0, 1.0])
        with pytest.raises(ValueError, match="got NaN in 1 places"):
            Criterion(loss)(SCORES[:, :4], TARGETS, unknown)
        assert Criterion(loss)(SCORES[:, :4], TARGETS, unknown, mask=~unknown.isnan()).isfinite()
    for answers in (torch.tensor([[2, 0]]), torch.tensor([[1, -2]]), torch.tensor([[1.02, 0.0]])):
        with pytest.raises(ValueError, match=of_answers):
            Criterion(one_vs_all)(SCORES, TARGETS, answers.expand(4, 2))
    law, every = F.one_hot(TARGETS, 3).float(), torch.tensor([[0.2, 0.9]])
    torch.testing.assert_close(
        Criterion(single_stage_deferral)(SCORES, law, every), single_stage_deferral(SCORES, law, every).mean()
    )
    torch.testing.assert_close(Criterion(one_vs_all)(SCORES, law, every.round()), one_vs_all(SCORES, law, every.round()).mean())


def test_criterion_refuses_a_chance_of_being_right_where_the_loss_asks_who_is_right() -> None:
    chance, known = torch.tensor([[0.25, 1.0]]), torch.tensor([False, True])
    of_gate = [SCORES[:, :3], SCORES[:, :3]]
    for loss, scores in ((picce, [SCORES]), (partial(realizable_experts, q=0.5), [SCORES]), (mixture_of_experts, of_gate)):
        with pytest.raises(ValueError, match=r"expert_correct: .* takes 0 and 1 alone, got 0\.25; draw an answer"):
            Criterion(loss)(*scores, TARGETS, chance.expand(4, 2))
        assert Criterion(loss)(*scores, TARGETS, chance.round().expand(4, 2)).isfinite()
    assert Criterion(picce)(SCORES, TARGETS, chance.expand(4, 2), mask=known.expand(4, 2)).isfinite()
    assert Criterion(one_vs_all)(SCORES, TARGETS, chance.expand(4, 2)).isfinite()
    with pytest.raises(ValueError, match=r"costs: realizable_router takes 0 and 1 alone, got 0\.02; with prices"):
        Criterion(realizable_router)(SCORES[:, :2], torch.tensor([[1.0, 0.02]]).expand(4, 2))
    assert Criterion(realizable_router)(SCORES[:, :2], torch.tensor([[1.0, 0.0]]).expand(4, 2)).isfinite()


def test_a_table_without_rows_is_refused_however_many_rows_there_are() -> None:
    for rows in (1, 2, 3, 4):
        for loss in (single_stage_deferral, one_vs_all, picce, realizable_experts):
            with pytest.raises(ValueError, match=r"got \(2,\) for scores .* same in every row \.expand"):
                loss(SCORES[:rows], TARGETS[:rows], torch.tensor([0.0, 1.0]))


def test_criterion_reads_numbers_that_belong_to_one_expert() -> None:
    scores, targets = torch.randn(3, 4, 6), torch.randint(5, (3, 4))
    for right in (torch.ones(4), torch.tensor(1.0)):
        torch.testing.assert_close(
            Criterion(mozannar_sontag)(scores, targets, right), mozannar_sontag(scores, targets, right).mean()
        )
    for values in ({"estimate": torch.full((4,), torch.nan), "predictor_loss": torch.rand(4)},):
        with pytest.raises(ValueError, match="estimate: expected"):
            Criterion(learned_loss)(**values)


def test_checks_of_values() -> None:
    with pytest.raises(ValueError, match="costs: expected finite costs, got infinity; close an action by a mask"):
        check_costs(torch.tensor([0.5, torch.inf]), ceiling=None)
    check_costs(torch.tensor([0.5, torch.inf]), ceiling=None, mask=torch.tensor([True, False]))
    check_targets(TARGETS, 3)
    check_scores(torch.tensor([0.0, -torch.inf]))
    with pytest.raises(ValueError, match="counted from 1"):
        check_targets(TARGETS + 1, 3)
    with pytest.raises(ValueError, match="over 3 classes"):
        check_targets(torch.rand(4, 2), 3)
    with pytest.raises(ValueError, match="non-negative costs"):
        check_costs(torch.tensor([-0.1, 0.2]))
    check_costs(torch.tensor([0.1, torch.nan]), mask=torch.tensor([True, False]))
    costs, known = torch.tensor([[0.5, 3.0], [2.0, 0.0]]), torch.tensor([[True, False], [True, True]])
    check_costs(costs, ceiling=torch.tensor([[1.0], [2.0]]), mask=known)
    with pytest.raises(ValueError, match=r"above the ceiling by 0\.5"):
        check_costs(costs, ceiling=torch.tensor([[1.0], [1.5]]), mask=known)
    check_mask(torch.tensor([[True, False]]), 1, 2)


def test_criterion_refuses_a_loss_whose_rows_it_would_not_know() -> None:
    for loss in (torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss()):
        with pytest.raises(TypeError, match="expected a loss of scores and targets, by these names"):
            Criterion(loss)


def test_criterion_on_nothing_and_on_weights_and_losses_of_any_options() -> None:
    none = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    for loss in (one_vs_all, single_stage_deferral):
        assert Criterion(loss)(*none, torch.zeros(0, 2)).isnan(), "a mean over nothing"
    with pytest.raises(ValueError, match="weights: expected non-negative"):
        Criterion(losses.comp_sum)(torch.randn(2, 3), -torch.rand(2, 3))
    taking_all = Criterion(lambda scores, targets, **options: scores[:, 0] * options["scale"], scale=2.0)
    torch.testing.assert_close(taking_all(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)), torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"cost: expected a cost in \[0, 1\]"):
        Criterion(losses.score_based_abstention)(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64), torch.tensor(1.3))
