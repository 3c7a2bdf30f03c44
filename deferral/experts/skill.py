"""Experts given by their skill P(right): one number per expert, or per row and expert; correlated, tiring, drifting, absent."""

import hashlib
import math

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.experts.confusion import check_indices
from deferral.validation import require_floating, require_share

__all__ = ["draw_with_skill", "drift", "fatigue", "hide_answers", "skill_near"]


@numpy_or_torch
def draw_with_skill(
    skill: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    seed: int,
    correlation: float = 0.0,
    same_mistake: bool = False,
) -> Tensor:
    """Answers of E experts who are right with probability `skill`, else wrong evenly.  (E,) or (N, E), (N,) -> (N, E)

    Expert j is right on row i iff z_ij < the skill's normal quantile, where z_ij are standard normal with the same
    `correlation` in [0, 1] between every two experts (a one-factor Gaussian copula, the law of Vasicek 1987): each expert keeps
    its skill, whatever the correlation, and two experts of skill 1/2 are both right with probability
    1/4 + arcsin(correlation) / (2 pi).  At 1, who is less skilled is right only where the more skilled one is.

    A wrong answer is drawn from the K - 1 wrong classes, by each expert for itself; with `same_mistake=True` all who are wrong
    on a row give the same wrong answer.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    check_indices("targets", targets, num_classes)
    require_share("correlation", correlation)
    require_floating("skill", skill)
    # A vector as long as the rows is one expert's skill far more often than it is that many experts.
    wanted = skill.dim() == 1 and (len(skill) != len(targets) or len(targets) == 1)
    if not wanted and (skill.dim() != 2 or len(skill) not in (1, len(targets))):
        raise ValueError(
            f"skill: expected one per expert (E,), or per row and expert ({len(targets)}, E), got shape {tuple(skill.shape)}; "
            "the skill (N,) of one expert is skill.unsqueeze(-1), that of E = N experts is skill.unsqueeze(0)"
        )
    _check_probabilities("skill", skill)
    rows, experts = len(targets), skill.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(rows, experts, generator=generator, dtype=torch.float64)
    ability = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    right = ability < torch.special.ndtri(skill.double().cpu())
    shifts = torch.randint(1, num_classes, (rows, 1 if same_mistake else experts), generator=generator)
    truth = targets.cpu().unsqueeze(-1)
    return torch.where(right, truth, (truth + shifts) % num_classes).to(targets.device)


@numpy_or_torch
def skill_near(features: Tensor, centre: Tensor, *, width: float, near: float, far: float) -> Tensor:
    """P(right) that falls from `near` at the centre to `far` away from it.  (N, d), (E, d) -> (N, E)

    far + (near - far) exp(-|x - centre|^2 / (2 width^2)): experts who know one region of the inputs each; one centre (d,) is one
    expert.  Any other function of the features into [0, 1] does as well for `draw_with_skill`.
    """
    if features.dim() != 2 or centre.dim() not in (1, 2) or centre.shape[-1] != features.shape[-1]:
        raise ValueError(
            f"features and centre: expected (N, d) with (d,) or (E, d), got {tuple(features.shape)} and {tuple(centre.shape)}; "
            "flatten images with .flatten(1)"
        )
    if not width > 0:
        raise ValueError(f"width: expected a positive distance, got {width}")
    _check_probabilities("near and far", torch.tensor([near, far]))
    # Lifted: the difference of half-precision squares would round the nearest rows away.
    points, centres = features.double(), centre.to(features.device).double()
    distances = torch.cdist(points, centres.reshape(-1, points.shape[-1]), compute_mode="donot_use_mm_for_euclid_dist")
    return far + (near - far) * torch.exp(-0.5 * (distances / width).square())


@numpy_or_torch
def drift(start: float | Tensor, end: float | Tensor, num_rows: int) -> Tensor:
    """Skill that moves on a straight line from the first row to the last.  Numbers -> (N, 1), (E,) -> (N, E)"""
    if num_rows < 1:
        raise ValueError(f"num_rows: expected at least 1, got {num_rows}")
    return fatigue(start, end, num_rows, shift=num_rows)


@numpy_or_torch
def fatigue(start: float | Tensor, end: float | Tensor, num_rows: int, *, shift: int) -> Tensor:
    """Skill that falls from `start` to `end` within each shift and recovers at the next.  Numbers -> (N, 1), (E,) -> (N, E)

    The fall is a straight line over `shift` rows; row t is number t mod shift of its shift, so rows stand in the order in which
    the expert is asked.
    """
    if num_rows < 1 or shift < 1:
        raise ValueError(f"num_rows and shift: expected at least 1, got {num_rows} and {shift}")
    first, last = torch.broadcast_tensors(_as_double(start), _as_double(end))
    if first.dim() > 1:
        raise ValueError(f"start and end: expected numbers, or one per expert (E,), got shape {tuple(first.shape)}")
    _check_probabilities("start and end", torch.stack([first, last]))
    tired = (torch.arange(num_rows, device=first.device) % shift).double() / max(shift - 1, 1)
    return torch.lerp(first.reshape(-1), last.reshape(-1), tired.unsqueeze(-1))


@numpy_or_torch
def hide_answers(answers: Tensor, probability: float | Tensor, *, seed: int) -> Tensor:
    """The answers, each one missing with the given probability: -1, or NaN where answers are real.  (...,) -> (...,)

    `probability` is a number, or broadcasts to the answers: (E,) per expert, (N, 1) per row, (N, E) per answer.  Where it
    depends on whether the answer is right, given the input, a mask is not enough: weigh by propensity.
    """
    if not answers.is_floating_point() and answers.dtype != torch.int64:
        raise TypeError(
            f"answers: expected class indices of dtype int64 or real numbers, got {answers.dtype}; use answers.long()"
        )
    chance = _as_double(probability).cpu()
    _check_probabilities("probability", chance)
    try:
        chance = chance.expand(answers.shape)
    except RuntimeError as error:
        raise ValueError(
            f"probability: expected a number or a shape that broadcasts to answers {tuple(answers.shape)}, got "
            f"{tuple(chance.shape)}; one per row is (N, 1)"
        ) from error
    # Numbers of its own: those that `draw_with_skill` begins with at the same seed would make it the less able who is absent.
    digest = hashlib.blake2b(f"hide_answers {seed}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    hidden = torch.rand(answers.shape, generator=generator, dtype=torch.float64) < chance
    return answers.masked_fill(hidden.to(answers.device), torch.nan if answers.is_floating_point() else -1)


def _as_double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _check_probabilities(name: str, values: Tensor) -> None:
    inside = (values >= 0) & (values <= 1)
    if not bool(inside.all()):
        raise ValueError(f"{name}: expected probabilities in [0, 1], got {values[~inside].flatten()[0].item():g}")
