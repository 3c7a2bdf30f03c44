"""A small network with one head per expert: the probability that its answer is right."""

import numpy as np

from deferral.routing.policies.networks import DROPOUT, above_mean, layers, trained, two_layers
from deferral.routing.policies.policy import Folded
from deferral.routing.vectors import Arrays, Vectors

__all__ = ["Factors", "Heads"]


class Heads:
    """P(right) of every expert from a shared hidden layer, by the logistic loss of the known outcomes."""

    kind = "heads"
    _rectified = True

    def __init__(self, *, hidden: int = 64) -> None:
        self.hidden = hidden
        self.arrays: Arrays = {}
        self._layers = Folded(layers)

    def fit(self, vectors: Vectors, quality: np.ndarray, weights: np.ndarray, means: np.ndarray, *, seed: int = 0) -> "Heads":
        # Whoever only routes need not hold torch in memory: it is imported where something is trained.
        import torch
        import torch.nn.functional as F
        from torch import Tensor, nn

        x = torch.from_numpy(vectors.joined)
        # Where nothing is known of an input, the answer is the expert's mean.
        start = torch.logit(torch.from_numpy(means).float(), eps=1e-3)
        targets, known = torch.from_numpy(quality).float(), torch.from_numpy(weights).float()

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            each = F.binary_cross_entropy_with_logits(logits + start, targets[rows], reduction="none")
            return (each * known[rows]).sum(-1)

        def network() -> nn.Sequential:
            return two_layers(x.shape[1], self.hidden, len(means), dropout=DROPOUT, rectified=self._rectified)

        self.arrays = {**trained(network, x, loss, start=start, seed=seed), "means": means}
        return self

    def deviations(self, vectors: Vectors) -> np.ndarray:
        """Expected quality above the expert's mean.  -> (N, E)"""
        return above_mean(self._layers(self.arrays, vectors), vectors, rectified=self._rectified)


class Factors(Heads):
    """Matrix factorisation: P(right) = sigmoid(u(query) . v_expert + b_expert) with u linear in the query's vector.

    Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data" (2024), section 4.2, here trained on outcomes.
    """

    kind = "factors"
    _rectified = False

    def __init__(self, *, hidden: int = 16) -> None:
        super().__init__(hidden=hidden)
