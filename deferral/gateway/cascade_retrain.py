"""A cascade learned again from the gateway's own traffic, which replaces the old one only if it is better with confidence."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from deferral.errors import DataError
from deferral.gateway.cascade_answers import answers_on_record
from deferral.routing.cascade import Cascade
from deferral.routing.cascade_fitting import fit_cascade, gain_over
from deferral.routing.persistence import check_unchanged, written
from deferral.routing.router import Router

__all__ = ["CascadeVerdict", "retrain_cascade"]


@dataclass(frozen=True)
class CascadeVerdict:
    """Whether the new cascade pays and is better with confidence, and whether it took the old one's place."""

    better: bool
    promoted: bool
    cascade: Cascade
    price_of_error: float
    gain: float  # errors a query that changing to it saves
    half: float  # half the 95% interval
    left_out: dict[str, int]

    def __str__(self) -> str:
        error = self.price_of_error
        return "\n".join(
            [
                self.cascade.report(error),
                *(f"{count} rows left out: {reason}" for reason, count in self.left_out.items()),
                f"against the cascade that is there it saves {self.gain:.4f} ± {self.half:.4f} errors a query at ${error:.3g} "
                "an error (95%)",
            ]
        )


def retrain_cascade(
    engine: Engine,
    folder: str | Path,
    *,
    dry_run: bool = False,
    load: Callable[[Path], Router] = Router.load,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> CascadeVerdict:
    """Fit the cascade of a router again on the first answers of the record, and compare it with the one that is there.

    DataError where the router has none.  A router with an encoder of your own needs a `load` that passes it.  `on_stage` is told
    what is begun.
    """
    folder = Path(folder)
    before, router = written(folder), load(folder)
    old, error = router.cascade, router.price_of_error
    if old is None:
        raise DataError(f"{folder} has no cascade; make the first with `deferral route cascade LOG -r {folder} --first EXPERT`")
    left_out: Counter[str] = Counter()
    on_stage("reading the record")
    answers = answers_on_record(engine, router.experts, old.first, left_out)
    on_stage(f"learning from {len(answers):,} answers of {old.first}")
    new = fit_cascade(answers, seed=seed)
    gain, half = gain_over(old, answers, error, seed=seed)
    better = new.why_not(error) == "" and gain > half
    if better and not dry_run:
        router.cascade = new
        check_unchanged(folder, before)
        router.save(folder)
    return CascadeVerdict(better, better and not dry_run, new, error, gain, half, dict(left_out.most_common()))
