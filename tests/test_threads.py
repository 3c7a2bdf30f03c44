"""What is learned over small arrays is learned in one thread, and torch has its threads back."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from deferral.estimators import AbstainingClassifier
from deferral.intervals import bootstrap
from deferral.routing import Log, Outcome, Router
from deferral.routing.policies import Linear
from deferral.threads import one_thread


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads() -> list[int]:
    return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]


def test_one_thread_and_then_as_many_as_before() -> None:
    before = threads()
    with one_thread():
        assert set(threads()) == {1}
    assert threads() == before

    @one_thread()
    def failing() -> None:
        raise KeyError(*set(threads()))

    with pytest.raises(KeyError, match=r"^1$"):
        failing()
    assert threads() == before


def test_resamples_are_judged_in_one_thread() -> None:
    seen = []

    def metric(weights: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return weights.mean(-1)

    bootstrap(metric, 10, resamples=5)
    with pytest.raises(TypeError):
        bootstrap(lambda weights: "none", 10, resamples=5)  # type: ignore[arg-type, return-value]
    assert (seen, torch.get_num_threads()) == ([1], 3)


def test_a_router_and_an_estimator_learn_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    class Watched(Linear):
        def fit(self, *args, **kwargs):
            seen.update(threads())
            return super().fit(*args, **kwargs)

    rows = range(60)
    log = Log(Outcome(f"question {row}", name, float((row + j) % 2), 0.001) for row in rows for j, name in enumerate("ab"))
    before = threads()
    Router(0.01, policies=[Watched]).fit(log)
    assert seen == {1}
    seen.clear()
    step = torch.optim.LBFGS.step
    monkeypatch.setattr(torch.optim.LBFGS, "step", lambda self, closure: seen.update(threads()) or step(self, closure))
    table = np.random.default_rng(0).normal(size=(60, 2))
    AbstainingClassifier().fit(table, table[:, 0] > 0)
    assert seen == {1}
    assert threads() == before
