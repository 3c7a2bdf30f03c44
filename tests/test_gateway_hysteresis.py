"""When a conversation changes its expert: fast up, slow down, and only for a gain above its margin."""

import math

import numpy as np
import pytest

from deferral.gateway.hysteresis import Place, Rules, Scored, moved

RULES = Rules(up=0.01, down=0.0, patience=2)
SMALL, LARGE = 0, 1


def scored(small: tuple[float, float], large: tuple[float, float]) -> Scored:
    """Of (quality, cost) of both."""
    quality, cost = np.array([small, large]).T
    return Scored("a query", quality, cost, np.zeros(2), np.zeros(2), True)


UP, DOWN, SAME = scored((0.2, 0.8), (0.9, 0.3)), scored((0.9, 0.1), (0.95, 0.3)), scored((0.9, 0.2), (0.9, 0.2))


@pytest.mark.parametrize(
    ("place", "turn", "after"),
    [
        ((SMALL, 0), UP, (LARGE, 0)),
        ((LARGE, 0), UP, (LARGE, 0)),
        ((LARGE, 1), UP, (LARGE, 0)),
        ((LARGE, 0), DOWN, (LARGE, 1)),
        ((LARGE, 1), DOWN, (SMALL, 0)),
        ((SMALL, 0), DOWN, (SMALL, 0)),
        ((LARGE, 1), SAME, (LARGE, 0)),
        ((SMALL, 0), UP._replace(lost=np.array([0.6, 0.6])), (SMALL, 0)),
        ((LARGE, 1), DOWN._replace(lost=np.array([0.3, 0.3])), (LARGE, 0)),
        ((LARGE, 0), SAME._replace(kept=np.array([0.0, 0.3])), (LARGE, 1)),
        ((SMALL, 0), UP._replace(kept=np.array([0.0, 0.6])), (SMALL, 0)),
        ((LARGE, 1), SAME._replace(kept=np.array([0.1, 0.3]), lost=np.array([0.3, 0.9])), (LARGE, 0)),
        ((LARGE, 1), DOWN._replace(known=False), (LARGE, 1)),
        ((SMALL, 0), UP._replace(known=False), (SMALL, 0)),
        ((SMALL, 0), UP._replace(cost=np.array([0.8, np.inf])), (SMALL, 0)),
        ((LARGE, 1), UP._replace(cost=np.array([0.8, np.inf])), (SMALL, 0)),
        ((LARGE, 0), scored((0.905, 0.1), (0.9, 0.3)), (LARGE, 1)),
        ((LARGE, 0), scored((0.95, 0.1), (0.9, 0.3)), (SMALL, 0)),
    ],
)
def test_fast_up_slow_down(place: tuple[int, int], turn: Scored, after: tuple[int, int]) -> None:
    assert moved(Place(*place, 1.0), turn, RULES) == Place(*after, 1.0)


def test_a_gain_has_to_exceed_its_margin() -> None:
    for margin, expert in ((0.49, LARGE), (0.51, SMALL)):
        assert moved(Place(SMALL, 0, 1.0), UP, Rules(up=margin)).expert == expert
    for margin, expert in ((0.19, SMALL), (0.21, LARGE)):
        assert moved(Place(LARGE, 1, 1.0), DOWN, Rules(down=margin, patience=2)).expert == expert


@pytest.mark.parametrize("wrong", [{"up": -1}, {"up": math.inf}, {"down": math.nan}, {"patience": 0}, {"follow_up": -1}])
def test_rules_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Rules(**wrong)
