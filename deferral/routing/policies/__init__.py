"""Estimators of every expert's quality, behind one interface (`Policy`)."""

from deferral.routing.policies.clusters import Clusters
from deferral.routing.policies.features import Features
from deferral.routing.policies.heads import Factors, Heads
from deferral.routing.policies.linear import Linear
from deferral.routing.policies.neighbours import Beside, Neighbours
from deferral.routing.policies.policy import Policy, centred, expert_means
from deferral.routing.policies.rejector import Rejector

__all__ = [
    "Beside",
    "Clusters",
    "Factors",
    "Features",
    "Heads",
    "Linear",
    "Neighbours",
    "Policy",
    "Rejector",
    "centred",
    "expert_means",
]
