"""Many linear heads trained at once."""

import pytest
import torch

from benchmarks.harness.heads import Head, at, fit
from benchmarks.harness.training import Diverged


def test_many_problems_at_once_are_as_good_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 60, 4, generator=generator)
    y = x @ torch.randn(3, 4, 1, generator=generator)

    def train_on(problems: slice) -> torch.Tensor:
        inputs, targets = x[problems], y[problems]
        together = Head(x, 1, hidden=8, seed=0)
        head = Head(inputs, 1, hidden=8, seed=0)
        for mine, first in zip(head.parameters(), together.parameters(), strict=True):
            mine.data = first.data[problems].clone()

        def loss(i: torch.Tensor) -> torch.Tensor:
            return (head(at(inputs, i)) - at(targets, i)).squeeze(-1).square()

        fit([head], loss, len(inputs), 60, steps=150, seed=1, learning_rate=0.02)
        return head(inputs)

    together = train_on(slice(0, 3))
    alone = torch.cat([train_on(slice(k, k + 1)) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert (together - y).square().mean() < 0.1 * y.square().mean()


def test_a_head_learns_from_the_rows_it_is_given_alone() -> None:
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    only = torch.stack([torch.arange(10, 25), torch.arange(15)])
    for batch in (4, 100):
        seen: list[torch.Tensor] = []
        head = Head(x, 1, hidden=0, seed=0)

        def loss(i: torch.Tensor, head: Head = head, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(i)
            return head(at(x, i)).squeeze(-1).square()

        fit([head], loss, 2, 30, only=only, steps=20, seed=0, batch=batch)
        rows = torch.cat(seen, dim=1)
        assert [set(rows[k].tolist()) for k in range(2)] == [set(only[k].tolist()) for k in range(2)]


def test_each_head_has_its_own_weight_decay() -> None:
    heads = [Head(torch.randn(1, 10, 2), 1, hidden=0, seed=0) for _ in range(2)]
    before = [p.clone() for p in heads[0].parameters()]

    def still(i: torch.Tensor) -> torch.Tensor:
        return torch.stack([0 * head(torch.ones(1, 10, 2)).squeeze(-1) for head in heads]).sum(dim=0)

    # Without a gradient, what moves a parameter is its decay.
    fit(heads, still, 1, 10, steps=3, seed=0, weight_decay=[0.0, 9.0])
    assert all(torch.equal(a, b) for a, b in zip(before, heads[0].parameters(), strict=True))
    assert all((a.abs() > b.abs()).all() for a, b in zip(before, heads[1].parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_a_head_before_the_step() -> None:
    head = Head(torch.randn(1, 10, 2), 1, hidden=0, seed=0)
    before = [p.clone() for p in head.parameters()]
    with pytest.raises(Diverged, match="step 1 of 1: the loss is 0, the size of its gradient nan"):
        # sqrt at 0 is finite and its slope is not.
        fit([head], lambda i: (0 * head(torch.ones(1, 10, 2)).squeeze(-1)).sqrt(), 1, 10, steps=1, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


def test_a_head_that_diverges_says_where() -> None:
    head = Head(torch.randn(1, 10, 2), 1, hidden=0, seed=0)
    before = [p.clone() for p in head.parameters()]
    with pytest.raises(Diverged, match="step 1 of 5: the loss is nan"):
        fit([head], lambda i: head(torch.full((1, 10, 2), torch.nan)).squeeze(-1), 1, 10, steps=5, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
