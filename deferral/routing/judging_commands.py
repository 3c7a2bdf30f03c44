"""`deferral route evaluate` and `simulate`: what routing is worth on a log.  Parses and prints, decides nothing."""

from pathlib import Path
from typing import Any

import click
import numpy as np

from deferral.command_line import Command
from deferral.routing.evaluation import trade_offs
from deferral.routing.judging import (
    at_settings,
    bill,
    check_full,
    cross_fitted,
    evaluation,
    held,
    joined,
    query_folds,
    subjects,
    tag_folds,
)
from deferral.routing.options import (
    FILE,
    FOLDER,
    NEW_FOLDER,
    POSITIVE,
    encoder_of,
    encoder_options,
    setting_of,
    setting_options,
)
from deferral.routing.progress import progress, reading, working
from deferral.routing.replay import as_logged, events_of, replay
from deferral.routing.router import Router
from deferral.routing.showing import draw_evaluation, save_evaluation, show_bill, show_evaluation, show_replays

__all__ = ["evaluate", "simulate"]


@click.command(cls=Command)
@click.argument("log", type=FILE)
@click.option("--router", "-r", "folder", type=FOLDER, help="Judge this router, on queries that it was not fitted on.")
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    help="How many folds, without --router.  [default: 5, or with --by-tag as many as there are subjects if those are fewer]",
)
@click.option(
    "--by-tag", is_flag=True, help="Without --router: make folds of whole subjects; the first tag of a query is its subject."
)
@click.option("--price-of-error", type=POSITIVE, help="Also report what each policy costs at this price of an error.")
@encoder_options
@click.option("--out", "-o", type=NEW_FOLDER, help="Folder for evaluation.json and curve.png.")
@click.option("--resamples", type=click.IntRange(min=100), default=1000, show_default=True, help="How many bootstrap resamples.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def evaluate(
    log: Path,
    folder: Path | None,
    folds: int | None,
    by_tag: bool,
    price_of_error: float | None,
    encoder: Path | None,
    cache: Path | None,
    out: Path | None,
    resamples: int,
    seed: int,
) -> None:
    """Judge routing on a LOG in which every expert answered every query.

    Without --router: routers are fitted on all folds but one and judge that one, on held-out queries or (--by-tag) on held-out
    subjects.  With --router: that router is judged, on another data set for instance.
    """
    for name, given in (("--by-tag", by_tag), ("--folds", folds is not None)):
        if folder is not None and given:
            raise click.UsageError(f"{name} cannot be combined with --router: folds fit routers of their own")
    outcomes = reading(log)
    table = outcomes.table()
    check_full(table)
    if out is not None:
        # Before the work, not after it.
        out.mkdir(parents=True, exist_ok=True)
    encode, group = encoder_of(encoder, cache), None
    errors = trade_offs(table.price)
    settings = len(errors)
    if price_of_error is not None:
        errors = np.append(errors, price_of_error)
    if folder is not None:
        router = Router.load(folder, encoder=encode)
        new = ~router.knows(table.queries)
        if not new.any():
            raise click.ClickException("the router was fitted on every query of this log; leave --router out to judge by folds")
        if not new.all():
            click.echo(f"left out: {int((~new).sum()):,} queries that the router was fitted on", err=True)
        rows = held(router, table.rows(np.flatnonzero(new)), errors)
    else:
        fold = tag_folds(outcomes, table, folds=folds) if by_tag else query_folds(table, folds=folds, seed=seed)
        parts, count = [], len(np.unique(fold))
        with progress(f"fitting and judging {count} folds") as bar:
            task = bar.add_task("fitting and judging folds", total=count)
            # The price of an error is one among many here: judged over all of them.
            for _, part in cross_fitted(lambda: Router(1.0, encoder=encode, seed=seed), table, fold, errors):
                parts.append(part)
                bar.advance(task)
        rows = joined(parts)
        if by_tag:
            group = subjects(outcomes, table)[1][np.argsort(fold, kind="stable")]
    with working("bootstrap"):
        found = evaluation(at_settings(rows, slice(settings)), group=group, resamples=resamples, seed=seed)
        spent = None
        if price_of_error is not None:
            spent = bill(at_settings(rows, slice(settings, None)), group=group, resamples=resamples, seed=seed)
    show_evaluation(found)
    if spent is not None and price_of_error is not None:
        show_bill(spent, price_of_error)
    if out is not None:
        save_evaluation(found, out / "evaluation.json", bill=spent)
        drawn = draw_evaluation(found, out / "curve.png")
        click.echo(f"wrote {out / 'evaluation.json'}")
        click.echo(
            f"wrote {out / 'curve.png'}" if drawn else "curve.png is left out: it needs matplotlib, `pip install matplotlib`"
        )


@click.command(cls=Command)
@click.argument("log", type=FILE)
@setting_options
@encoder_options
@click.option("--include-seen", is_flag=True, help="Keep the queries that the router was fitted on, although they flatter it.")
@click.option("--resamples", type=click.IntRange(min=100), default=1000, show_default=True, help="How many bootstrap resamples.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def simulate(
    log: Path,
    folder: Path,
    encoder: Path | None,
    cache: Path | None,
    include_seen: bool,
    resamples: int,
    seed: int,
    **options: Any,
) -> None:
    """Replay LOG under the router, and under each expert alone: what would it have cost, by three off-policy estimates?

    Every outcome of the log is one decision, with the propensity with which its expert was asked.
    """
    router = Router.load(folder, encoder=encoder_of(encoder, cache))
    outcomes = reading(log)
    for name in router.experts:
        if name not in outcomes.experts:
            click.echo(f"the log has no outcome of {name}, so ips and self-normalised ignore decisions for it", err=True)
    seen = router.knows(outcomes.queries)
    if include_seen:
        seen[:] = False
    if seen.any():
        click.echo(f"left out: {int(seen.sum()):,} queries that the router was fitted on", err=True)
        if seen.all():
            raise click.ClickException("no query is left; simulate on others, or add --include-seen")
    events = events_of(outcomes, router.experts, kept=~seen)
    setting = setting_of(options)
    error = router.plan(**setting).price_of_error
    with working(f"replaying {len(events.query):,} decisions"):
        chances, quality, price = router.chances(events.queries, **setting)
        policies = {"router": chances}
        for place, name in enumerate(router.experts):
            if name not in outcomes.experts:
                continue
            policies[f"always {name}"] = np.tile(np.eye(len(router.experts))[place], (len(chances), 1))
        replays = {
            name: replay(events, one, error, quality=quality, price=price, resamples=resamples, seed=seed)
            for name, one in policies.items()
        }
    show_replays(as_logged(events, error, resamples=resamples, seed=seed), replays, events.assumed)
