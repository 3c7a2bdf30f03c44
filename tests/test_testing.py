"""check_loss on losses with planted defects: it must name what each violates."""

import pytest
import torch
from torch import Tensor

from deferral.losses import regression_deferral, single_stage_deferral, two_stage_deferral
from deferral.numerics import lift
from deferral.testing import (
    CEILING,
    ONE_EXPERT,
    PROPERTIES,
    REGRESSION,
    SINGLE_STAGE,
    SINGLE_STAGE_BINARY,
    TWO_STAGE,
    E,
    K,
    Rows,
    bayes,
    bounded_below,
    check_loss,
    gradient,
    half_precision,
    one_value_per_example,
)


def unshifted_exponential(scores: Tensor, rows: Rows) -> Tensor:
    p = scores.exp() / scores.exp().sum(-1, keepdim=True)
    weights = torch.cat([torch.nn.functional.one_hot(rows["targets"], K), 1 - rows["expert_costs"]], -1)
    return -(weights * p.log()).sum(-1)


def epsilon_inside_the_logarithm(scores: Tensor, rows: Rows) -> Tensor:
    weights = torch.cat([torch.nn.functional.one_hot(rows["targets"], K), 1 - rows["expert_costs"]], -1)
    return -(weights * torch.log(scores.softmax(-1) + 1e-8)).sum(-1)


def weight_that_can_go_negative(scores: Tensor, rows: Rows) -> Tensor:
    return -((1 - rows["costs"]) * scores.log_softmax(-1)).sum(-1)


def blind_to_whether_the_expert_was_right(scores: Tensor, rows: Rows) -> Tensor:
    log_p = scores.log_softmax(-1)
    return -log_p.gather(-1, rows["targets"].unsqueeze(-1)).squeeze(-1) - 0.5 * log_p[..., K]


def loop_that_drops_the_last_expert(scores: Tensor, rows: Rows) -> Tensor:
    log_p = scores.log_softmax(-1)
    loss = -log_p.gather(-1, rows["targets"].unsqueeze(-1)).squeeze(-1)
    for j in range(E - 1):
        loss = loss - rows["expert_correct"][..., j] * log_p[..., K + j]
    return loss


def overwrites_the_callers_zeros(scores: Tensor, rows: Rows) -> Tensor:
    with torch.no_grad():
        scores[scores.abs() < 0.2] = 0.3
    return single_stage_deferral(scores, rows["targets"], rows["expert_costs"])


def overwrites_the_callers_costs(scores: Tensor, rows: Rows) -> Tensor:
    return single_stage_deferral(scores, rows["targets"], rows["expert_costs"].clamp_(0.1, 0.9))


def leaves_out_the_hardest_tenth(scores: Tensor, rows: Rows) -> Tensor:
    losses = single_stage_deferral(scores, rows["targets"], rows["expert_costs"])
    return losses.where(losses <= losses.quantile(0.9), 0.0) if losses.numel() >= 10 else losses


def favours_a_class(scores: Tensor, rows: Rows) -> Tensor:
    return (1 + 0.05 * (rows["targets"] == 0)) * single_stage_deferral(scores, rows["targets"], rows["expert_costs"])


def favours_an_expert(scores: Tensor, rows: Rows) -> Tensor:
    return two_stage_deferral(scores, rows["costs"] * torch.tensor([1, 0.98, 1]), ceiling=1.3)


def blind_to_the_first_action(scores: Tensor, rows: Rows) -> Tensor:
    seen = torch.cat([scores[..., :1].detach(), scores[..., 1:]], -1)
    return two_stage_deferral(seen, rows["costs"], ceiling=1.3)


def post_hoc(scores: Tensor, rows: Rows) -> Tensor:
    """Sound, though the own predictor is not one of the experts: the gains over it are regressed (Narasimhan et al. 2022)."""
    gains = rows["costs"][..., :1] - rows["costs"][..., 1:]
    return (lift(scores)[..., 1:] - lift(scores)[..., :1] - gains).square().sum(-1)


def viewed_in_double(scores: Tensor, rows: Rows) -> Tensor:
    flat = scores.double().view(-1, scores.shape[-1])
    losses = single_stage_deferral(flat, rows["targets"].view(-1), rows["expert_costs"].double().view(-1, E))
    return losses.view(scores.shape[:-1])


def detached_where_it_matters(scores: Tensor, rows: Rows) -> Tensor:
    return single_stage_deferral(scores.detach() * 0.5 + scores * 0.5, rows["targets"], rows["expert_costs"])


def test_planted_defects_are_named() -> None:
    for defect, setting, expected in (
        (unshifted_exponential, SINGLE_STAGE, "finite"),
        (epsilon_inside_the_logarithm, SINGLE_STAGE, "pulls_when_wrong"),
        (weight_that_can_go_negative, TWO_STAGE, "bounded_below"),
        (blind_to_whether_the_expert_was_right, ONE_EXPERT, "bayes"),
        (loop_that_drops_the_last_expert, SINGLE_STAGE_BINARY, "every_expert_counts"),
        (overwrites_the_callers_zeros, SINGLE_STAGE, "leaves_its_input"),
        (overwrites_the_callers_costs, SINGLE_STAGE, "leaves_its_input"),
        (leaves_out_the_hardest_tenth, SINGLE_STAGE, "one_value_per_example"),
        (favours_a_class, SINGLE_STAGE, "classes_are_alike"),
        (favours_an_expert, TWO_STAGE, "every_expert_counts"),
        (blind_to_the_first_action, TWO_STAGE, "every_expert_counts"),
        (detached_where_it_matters, SINGLE_STAGE, "gradient"),
    ):
        # The search for minimisers takes a second each; where it is not what finds the defect, it is left out.
        report = check_loss(defect, setting, properties=[one for one in PROPERTIES if expected == "bayes" or one is not bayes])
        assert not report.ok
        assert expected in report.violations, f"{defect.__name__}: {report}"
        assert expected in str(report)


def learns_the_other_sign(scores: Tensor, rows: Rows) -> Tensor:
    return regression_deferral(lift((scores[..., 0] + rows["value"]).square()), scores[..., 1:], rows["expert_costs"])


def clamps_what_is_dearer_than_an_error(scores: Tensor, rows: Rows) -> Tensor:
    return ((1 - rows["costs"]).clamp(min=0) * -lift(scores).log_softmax(dim=-1)).sum(dim=-1)


def test_a_wrong_prediction_and_a_forgotten_price_are_found() -> None:
    for defect, setting in ((learns_the_other_sign, REGRESSION), (clamps_what_is_dearer_than_an_error, TWO_STAGE)):
        assert "decides" in check_loss(defect, setting, properties=[bayes]).violations["bayes"]


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_what_has_no_lower_end_is_found_in_any_unit_and_what_has_one_is_left_alone(unit: float) -> None:
    def utility(scores: Tensor, rows: Rows) -> Tensor:
        return -unit * ((CEILING - rows["costs"]) * lift(scores).softmax(dim=-1)).sum(dim=-1)

    assert bounded_below(utility, TWO_STAGE) is None
    assert bounded_below(lambda s, rows: unit * weight_that_can_go_negative(s, rows), TWO_STAGE) is not None


def test_a_loss_that_computes_in_single_precision_has_a_gradient_of_that_precision() -> None:
    def single(scores: Tensor, rows: Rows) -> Tensor:
        return single_stage_deferral(scores.float(), rows["targets"], rows["expert_costs"].float())

    assert gradient(single, SINGLE_STAGE) is None
    assert gradient(lambda s, rows: 2 * single(s.detach(), rows) + single(s, rows), SINGLE_STAGE) is not None


def test_a_sound_loss_passes_and_a_loss_that_raises_is_reported() -> None:
    sound = check_loss(lambda s, rows: single_stage_deferral(s, rows["targets"], rows["expert_costs"]), SINGLE_STAGE)
    assert sound.ok
    assert str(sound) == "no property is violated"
    assert check_loss(post_hoc, TWO_STAGE).ok
    assert check_loss(viewed_in_double, SINGLE_STAGE, properties=[bayes, one_value_per_example, half_precision]).ok
    with pytest.raises(ValueError, match="expected at least one"):
        check_loss(post_hoc, TWO_STAGE, properties=[])
    with pytest.raises(TypeError, match="say SINGLE_STAGE or TWO_STAGE, got 'two-stage'"):
        check_loss(post_hoc, "two-stage", properties=[one_value_per_example])  # type: ignore[arg-type]
    broken = check_loss(lambda s, rows: s[..., 99], SINGLE_STAGE, properties=[bayes])
    assert "IndexError" in broken.violations["bayes"]


class _WrongGradient(torch.autograd.Function):
    """The identity with a gradient a tenth too large."""

    @staticmethod
    def forward(context, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context, slope: Tensor) -> Tensor:
        return 1.1 * slope


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_is_held_to_the_same_digits_in_any_unit(unit: float, dtype: torch.dtype) -> None:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return unit * single_stage_deferral(scores.to(dtype), rows["targets"], rows["expert_costs"].to(dtype))

    assert gradient(loss, SINGLE_STAGE) is None
    assert gradient(lambda scores, rows: _WrongGradient.apply(loss(scores, rows)), SINGLE_STAGE) is not None


def test_a_gradient_is_checked_in_columns_that_count_little_too() -> None:
    def loss(scores: Tensor, rows: Rows) -> Tensor:
        wrong = _WrongGradient.apply(single_stage_deferral(scores, rows["targets"], rows["expert_costs"]))
        return 1e6 * scores[..., 0] + wrong

    assert gradient(loss, SINGLE_STAGE) is not None
