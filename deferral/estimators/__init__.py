"""scikit-learn estimators that may abstain or ask an expert, around any predictor.

`AbstainingClassifier`, `DeferralClassifier`, `AbstainingRegressor`, `DeferralRegressor`: `fit` trains the predictor, learns on
rows that it did not see what every action will cost, and fits the threshold; `predict` answers and marks deferrals, `decision`
says who answers, `expected_cost` why.
"""

from deferral.errors import installing

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"the estimators need scikit-learn: {installing('sklearn')}") from error

from deferral.estimators.classification import AbstainingClassifier, DeferralClassifier
from deferral.estimators.regression import AbstainingRegressor, DeferralRegressor
from deferral.estimators.training_rows import TrainingRowsWarning

__all__ = ["AbstainingClassifier", "AbstainingRegressor", "DeferralClassifier", "DeferralRegressor", "TrainingRowsWarning"]
