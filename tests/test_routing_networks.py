import numpy as np
import pytest
import torch
from torch import nn

from deferral.routing.policies.networks import ensemble, mean_network, trained

MEMBERS, INTO, HIDDEN, OUT = 3, 5, 8, 2


@pytest.mark.parametrize("activation", ["ReLU", "Identity"])
def test_one_network_says_what_an_ensemble_says_in_the_mean(activation: str) -> None:
    torch.manual_seed(0)
    several = ensemble(MEMBERS, (INTO, HIDDEN, OUT), activation, 0.5).eval()
    x = torch.randn(7, INTO)
    outputs = several(x)
    assert outputs.shape == (MEMBERS, 7, OUT)
    arrays = mean_network({name: value.numpy() for name, value in several.state_dict().items()})
    hidden = x.numpy() @ arrays["1.weight"] + arrays["1.bias"]
    hidden = np.maximum(hidden, 0) if activation == "ReLU" else hidden
    found = hidden @ arrays["4.weight"] + arrays["4.bias"]
    np.testing.assert_allclose(found, outputs.mean(0).detach().numpy(), atol=1e-6)


def test_members_learn_from_their_own_gradients_alone() -> None:
    torch.manual_seed(0)
    several = ensemble(MEMBERS, (INTO, HIDDEN, OUT), "ReLU", 0.0)
    x, y = torch.randn(16, INTO), torch.randn(16, OUT)
    ((several(x) - y) ** 2).mean((1, 2)).sum().backward()
    gradients = {name: value.grad for name, value in several.named_parameters()}
    for member in range(MEMBERS):
        first, last = nn.Linear(INTO, HIDDEN), nn.Linear(HIDDEN, OUT)
        layers, state = {"2": first, "5": last}, several.state_dict()
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(state[f"{name}.weight"][member].T)
                layer.bias.copy_(state[f"{name}.bias"][member, 0])
        ((last(first(x).relu()) - y) ** 2).mean().backward()
        for name, layer in layers.items():
            for part, own in (("weight", layer.weight.grad), ("bias", layer.bias.grad)):
                together = gradients[f"{name}.{part}"]
                assert together is not None
                assert own is not None
                torch.testing.assert_close(together[member].reshape(own.t().shape), own.t())


def test_members_differ_and_are_the_same_for_a_seed() -> None:
    x = torch.randn(300, INTO, generator=torch.Generator().manual_seed(0))
    truth = (x[:, :OUT] > 0).float()

    def loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        targets = truth[rows].expand_as(logits)
        return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)

    def network() -> nn.Sequential:
        return ensemble(MEMBERS, (INTO, HIDDEN, OUT), "ReLU", 0.5)

    one, again = (trained(network, x, loss, start=torch.zeros(OUT), seed=3) for _ in range(2))
    for name, values in one.items():
        np.testing.assert_array_equal(values, again[name])
        assert len(np.unique(values.reshape(MEMBERS, -1), axis=0)) == MEMBERS
