"""Properties that a surrogate loss should have, for anyone's loss: `check_loss(loss, setting)`.

A loss is handed over as a function of packed scores and of rows, in one of the settings below.  A row holds whatever a loss of
that setting may ask for; the setting knows what every action is expected to cost and how scores decide, so one suite serves
all.  The suite must be seen to fail what it should: the library's own tests run it over planted defects.
"""

from deferral.testing.minimisers import PROBLEMS, bayes, bayes_errors, minimiser, random_problems, wrong_decisions
from deferral.testing.report import PROPERTIES, Report, check_loss
from deferral.testing.settings import (
    ABSTENTION,
    ACCEPT,
    CEILING,
    ONE_EXPERT,
    PAIR,
    REGRESSION,
    REGRESSION_ABSTENTION,
    SINGLE_STAGE,
    SINGLE_STAGE_BINARY,
    TWO_STAGE,
    A,
    E,
    K,
    Rows,
    Setting,
    draw_rows,
)
from deferral.testing.values_and_gradients import (
    autocast,
    bounded_below,
    classes_are_alike,
    every_expert_counts,
    example,
    finite,
    gradient,
    half_precision,
    leaves_its_input,
    one_value_per_example,
    pulls_when_wrong,
    vmap,
)

__all__ = [
    "ABSTENTION",
    "ACCEPT",
    "CEILING",
    "ONE_EXPERT",
    "PAIR",
    "PROBLEMS",
    "PROPERTIES",
    "REGRESSION",
    "REGRESSION_ABSTENTION",
    "SINGLE_STAGE",
    "SINGLE_STAGE_BINARY",
    "TWO_STAGE",
    "A",
    "E",
    "K",
    "Report",
    "Rows",
    "Setting",
    "autocast",
    "bayes",
    "bayes_errors",
    "bounded_below",
    "check_loss",
    "classes_are_alike",
    "draw_rows",
    "every_expert_counts",
    "example",
    "finite",
    "gradient",
    "half_precision",
    "leaves_its_input",
    "minimiser",
    "one_value_per_example",
    "pulls_when_wrong",
    "random_problems",
    "vmap",
    "wrong_decisions",
]
