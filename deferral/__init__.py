"""deferral: learning to abstain and to defer to experts.

Price (`error_costs`), train (`deferral.losses`), decide (`decide`), judge (`deferral.metrics`); needs torch and numpy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deferral.calibration import fit_offsets
    from deferral.costs import error_costs, pick, single_stage_costs, squared_costs
    from deferral.decision import chow_scores, decide, decide_pair, deferral_margin, oracle
    from deferral.intervals import Interval, mean_interval, paired_difference
    from deferral.losses import (
        Criterion,
        predictor_rejector_abstention,
        regression_deferral,
        rejector_of_scores,
        score_based_abstention,
        single_stage_deferral,
        two_stage_abstention,
        two_stage_deferral,
    )

__version__ = "0.1.0"

__all__ = [
    "Criterion",
    "Interval",
    "chow_scores",
    "decide",
    "decide_pair",
    "deferral_margin",
    "error_costs",
    "fit_offsets",
    "mean_interval",
    "oracle",
    "paired_difference",
    "pick",
    "predictor_rejector_abstention",
    "regression_deferral",
    "rejector_of_scores",
    "score_based_abstention",
    "single_stage_costs",
    "single_stage_deferral",
    "squared_costs",
    "two_stage_abstention",
    "two_stage_deferral",
]

# Imported when first used: whoever only routes need not hold torch in memory.
_HOMES = {
    "calibration": ["fit_offsets"],
    "costs": ["error_costs", "pick", "single_stage_costs", "squared_costs"],
    "decision": ["chow_scores", "decide", "decide_pair", "deferral_margin", "oracle"],
    "intervals": ["Interval", "mean_interval", "paired_difference"],
    "losses": [
        "Criterion",
        "predictor_rejector_abstention",
        "regression_deferral",
        "rejector_of_scores",
        "score_based_abstention",
        "single_stage_deferral",
        "two_stage_abstention",
        "two_stage_deferral",
    ],
}
# Those that need torch and numpy alone; what needs an extra is imported by its name, and says what is missing.
_MODULES = [*_HOMES, "baselines", "curves", "experts", "metrics", "reliability", "testing"]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"deferral.{home}"), name)
    if name in _MODULES:
        return import_module(f"deferral.{name}")
    raise AttributeError(f"module 'deferral' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
