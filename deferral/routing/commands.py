"""`deferral route`: learn from a log which language model should answer.  Parses and prints, decides nothing."""

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deferral.command_line import Commands, FiniteRange
from deferral.errors import DataError
from deferral.routing.batches import route_file
from deferral.routing.cascade_fitting import add_cascade
from deferral.routing.constraints import Needs
from deferral.routing.encoders import CachedEncoder
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
from deferral.routing.log_files import read_log
from deferral.routing.onnx_export import export
from deferral.routing.outcomes import Log, spelt_alike
from deferral.routing.persistence import check_place, check_unchanged, keep_previous, previous_of, written
from deferral.routing.prices import read_prices, token_prices
from deferral.routing.replay import as_logged, events_of, replay
from deferral.routing.router import Router
from deferral.routing.sentences import sentence_encoder
from deferral.routing.showing import draw_evaluation, save_evaluation, show_bill, show_evaluation, show_explanation, show_replays

__all__ = ["route"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_NEW = click.Path(path_type=Path)
_NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
_SHARE = FiniteRange(0, 1, min_open=True, max_open=True)
_POSITIVE = FiniteRange(0, min_open=True)
_RARE = 20  # outcomes of an expert


class _Route(Commands):
    """A setting that cannot be met is an error of the caller's: said in one line."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except DataError:
            raise
        except ValueError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Route)
def route() -> None:
    """Learn from a log which language model should answer, and prove what that saves."""


def _encoder_options(command: Callable) -> Callable:
    for option in (
        click.option("--cache", type=_NEW, help="Folder that keeps the vectors of queries (with --encoder)."),
        click.option("--encoder", type=_FOLDER, help="Folder of a sentence encoder.  [default: n-grams, which need no weights]"),
    ):
        command = option(command)
    return command


def _setting_options(command: Callable) -> Callable:
    for option in (
        click.option("--deny", multiple=True, metavar="EXPERT", help="Never ask EXPERT; may be given several times."),
        click.option("--allow", multiple=True, metavar="EXPERT", help="Ask only EXPERT; may be given several times."),
        click.option("--region", "regions", multiple=True, help="Ask only experts of this region; may be given several times."),
        click.option("--images", is_flag=True, help="The query contains images."),
        click.option("--tools", is_flag=True, help="The query needs tools."),
        click.option(
            "--tokens",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="How many tokens the query has; experts with too small a context window are not asked.",
        ),
        click.option(
            "--max-latency", type=_POSITIVE, help="Ask only experts whose mean latency_s in the log is at most so many seconds."
        ),
        click.option("--confidence", type=_SHARE, default=0.95, show_default=True, help="Confidence of --certified-quality."),
        click.option("--certified-quality", type=_SHARE, help="Promise this share of the best expert's quality."),
        click.option("--min-quality", type=FiniteRange(0, 1), help="The lowest mean quality that is acceptable."),
        click.option("--budget", type=_POSITIVE, help="The most dollars per 1,000 queries, on average."),
        click.option("--price-of-error", type=_POSITIVE, help="What a wrong answer is worth, in dollars."),
        click.option("--router", "-r", "folder", type=_FOLDER, required=True, help="Folder of the router."),
    ):
        command = option(command)
    return command


def _setting(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of `Router.plan` among the options of a command."""
    needs = Needs.of(
        tokens=options["tokens"],
        tools=options["tools"],
        images=options["images"],
        regions=options["regions"] or None,
        allow=options["allow"] or None,
        deny=options["deny"],
    )
    names = ("price_of_error", "budget", "min_quality", "certified_quality", "confidence", "max_latency")
    return {**{name: options[name] for name in names}, "needs": None if needs == Needs() else needs}


@route.command()
@click.argument("log", type=_FILE)
@click.option(
    "--out", "-o", type=_NEW, required=True, help="Folder for the router; one that is there is kept as FOLDER.previous."
)
@click.option("--price-of-error", type=_POSITIVE, required=True, help="What a wrong answer is worth, in dollars.")
@_encoder_options
@click.option(
    "--explore",
    type=FiniteRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the queries that go to an expert drawn at random.",
)
@click.option(
    "--certify",
    type=FiniteRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the queries that is kept out of the fit, as proof for --certified-quality.",
)
@click.option(
    "--prices",
    type=_FILE,
    help='JSON file with the dollars per million tokens to come: {"EXPERT": {"input": 0.5, "output": 1.5}}.  '
    "[default: as logged]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def fit(
    log: Path,
    out: Path,
    price_of_error: float,
    encoder: Path | None,
    cache: Path | None,
    explore: float,
    certify: float,
    prices: Path | None,
    seed: int,
) -> None:
    """Learn a router from LOG (.jsonl, .ndjson or .parquet), and report what it is worth on held-out queries."""
    # Before the work, not after it.
    check_place(out)
    before, previous = written(out), previous_of(out)
    if before:
        check_place(previous)
    outcomes = _read(log)
    _warn_of_rare(outcomes)
    price_model = None if prices is None else token_prices(outcomes, read_prices(prices))
    router = Router(price_of_error, encoder=_encoder(encoder, cache), explore=explore, seed=seed)
    counts = np.bincount(outcomes.column("expert"), minlength=len(outcomes.experts)).tolist()
    of_each = ", ".join(f"{count:,} outcomes of {name}" for name, count in zip(outcomes.experts, counts, strict=True))
    with _working(f"fitting on {len(outcomes.queries):,} queries: {of_each}"):
        router.fit(outcomes, prices=price_model, certify=certify)
        check_unchanged(out, before)
        if before:
            keep_previous(out)
        router.save(out)
    click.echo(f"{router.report}\nwrote {out}" + (f"; the one that was there is {previous.name} now" if before else ""))


def _warn_of_rare(log: Log) -> None:
    """Of experts of whom next to nothing is known: they are taken to be like the mean, which nobody has seen; or mistyped."""
    counts = np.bincount(log.column("expert"), minlength=len(log.experts))
    for name, count in zip(log.experts, counts.tolist(), strict=True):
        if not (name.isascii() and name.isprintable()):
            # It is the name of a model in requests, and the value of a header.
            click.echo(
                f"warning: {name!r} has characters that are not printable ASCII; the gateway cannot serve an expert of that name",
                err=True,
            )
        if count < min(_RARE, counts.max() / 10):
            alike = difflib.get_close_matches(name, [other for other in log.experts if other != name], 1)
            mistyped = f"; is it {alike[0]}, mistyped?" if alike else "."
            click.echo(
                f"warning: {name} has only {count} of {len(log):,} outcomes, so the figures for it below are a guess{mistyped}  "
                "Leave it out, or add it with Router.add_expert once it has a hundred outcomes.",
                err=True,
            )


@route.command()
@click.argument("log", type=_FILE)
@click.option("--router", "-r", "folder", type=_FOLDER, help="Judge this router, on queries that it was not fitted on.")
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    help="How many folds, without --router.  [default: 5, or with --by-tag as many as there are subjects if those are fewer]",
)
@click.option(
    "--by-tag", is_flag=True, help="Without --router: make folds of whole subjects; the first tag of a query is its subject."
)
@click.option("--price-of-error", type=_POSITIVE, help="Also report what each policy costs at this price of an error.")
@_encoder_options
@click.option("--out", "-o", type=_NEW_FOLDER, help="Folder for evaluation.json and curve.png.")
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
    outcomes = _read(log)
    table = outcomes.table()
    check_full(table)
    if out is not None:
        # Before the work, not after it.
        out.mkdir(parents=True, exist_ok=True)
    encode, group = _encoder(encoder, cache), None
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
        with _progress(f"fitting and judging {count} folds") as progress:
            task = progress.add_task("fitting and judging folds", total=count)
            # The price of an error is one among many here: judged over all of them.
            for _, part in cross_fitted(lambda: Router(1.0, encoder=encode, seed=seed), table, fold, errors):
                parts.append(part)
                progress.advance(task)
        rows = joined(parts)
        if by_tag:
            group = subjects(outcomes, table)[1][np.argsort(fold, kind="stable")]
    with _working("bootstrap"):
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


@route.command()
@click.argument("query")
@_setting_options
@_encoder_options
@click.option(
    "--count", type=click.IntRange(min=0), default=5, show_default=True, help="How many of the nearest logged queries to show."
)
def explain(query: str, folder: Path, encoder: Path | None, cache: Path | None, count: int, **options: Any) -> None:
    """Say whom the router asks, what it expects of every expert, and which logged queries are nearest.

    Similarity to the log is the mean cosine with the ten nearest logged queries, lowered (but not with a sentence encoder) if the
    words of the query are rare in the log.  The number before each logged query is its cosine, not lowered, so it is usually
    larger.
    """
    router = Router.load(folder, encoder=_encoder(encoder, cache))
    show_explanation(*router.explain(query, count=count, **_setting(options)))


@route.command()
@click.argument("log", type=_FILE)
@_setting_options
@_encoder_options
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
    router = Router.load(folder, encoder=_encoder(encoder, cache))
    outcomes = _read(log)
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
    setting = _setting(options)
    error = router.plan(**setting).price_of_error
    with _working(f"replaying {len(events.query):,} decisions"):
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


@route.command()
@click.argument("queries", metavar="IN", type=_FILE)
@click.argument("out", type=_NEW)
@_setting_options
@click.option("--encoder", type=_FOLDER, help="Folder of the sentence encoder that the router was fitted with.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes.")
def batch(queries: Path, out: Path, folder: Path, encoder: Path | None, workers: int, **options: Any) -> None:
    """Route a file of queries: IN is .jsonl, .ndjson (objects with "query") or text, one query a line; OUT one decision a line.

    If it was stopped or killed, the same command continues where it was; once OUT is complete, it does nothing.
    """
    there = out.exists()
    with _progress(f"routing {queries.name}") as progress:
        task = progress.add_task("routing", total=queries.stat().st_size)

        def on_rows(rows: int, read: int) -> None:
            progress.update(task, completed=read, description=f"{rows:,} queries routed")

        rows = route_file(folder, queries, out, setting=_setting(options), encoder=encoder, workers=workers, on_rows=on_rows)
    if there:
        click.echo(f"{out} is complete, a decision for each query of {queries}; remove it to route them again")
    else:
        click.echo(f"wrote {out}, {rows:,} decisions")


@route.command()
@click.argument("log", type=_FILE)
@click.option("--router", "-r", "folder", type=_FOLDER, required=True, help="Folder of the router that gets the cascade.")
@click.option("--first", required=True, metavar="EXPERT", help="The expert that answers first.")
@_encoder_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def cascade(log: Path, folder: Path, first: str, encoder: Path | None, cache: Path | None, seed: int) -> None:
    """Learn when to keep the answer of an expert that is asked first, and when to ask another after it.

    The outcomes of EXPERT in LOG need a confidence: numbers computed from the log-probabilities of its answers.  The router gets
    the cascade only if it pays on held-out queries at some price of an error; if not, nothing changes and the exit status is 3.
    """
    outcomes, encode = _read(log), _encoder(encoder, cache)
    with _progress("learning when to defer") as progress:
        task = progress.add_task("learning when to defer", total=None)

        def on_fold(done: int, of: int) -> None:
            progress.update(task, description=f"estimates of routers that did not see the query, {done + 1} of {of}")

        def on_answers(count: int) -> None:
            progress.update(task, description=f"learning from {count:,} answers of {first} when to defer")

        found, error = add_cascade(folder, outcomes, first, encoder=encode, seed=seed, on_fold=on_fold, on_answers=on_answers)
    click.echo(found.report(error))
    if not found.paid.pays:
        click.echo(f"{folder} stays as it was")
        sys.exit(3)
    click.echo(f"wrote {folder}; a gateway uses it once it is reloaded")


@route.command()
@click.option("--router", "-r", "folder", type=_FOLDER, required=True, help="Folder of the router.")
@click.option("--price-of-error", type=_POSITIVE, required=True, help="What a wrong answer is worth from now on, in dollars.")
@click.option("--encoder", type=_FOLDER, help="Folder of the sentence encoder that the router was fitted with, if it was.")
def turn(folder: Path, price_of_error: float, encoder: Path | None) -> None:
    """Change the price of an error of a router, without learning anew; gateways use it once they reload."""
    saved, router = written(folder), Router.load(folder, encoder=encoder)
    before, router.price_of_error = router.price_of_error, price_of_error
    # What cannot be met is found before anything is written.
    router.plan()
    check_unchanged(folder, saved)
    router.save(folder)
    click.echo(f"{router.report}\n{folder}: ${price_of_error:g} an error, ${before:g} before; gateways use it once they reload")


@route.command("export-encoder")
@click.argument("source", type=_FOLDER)
@click.argument("out", type=_NEW)
@click.option("--int8", is_flag=True, help="Quantise the weights: faster, but the vectors are slightly off.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    help="How many tokens of a query the encoder reads.  [default: 128, or all the model takes if that is fewer]",
)
def export_encoder(source: Path, out: Path, int8: bool, max_tokens: int | None) -> None:
    """Make OUT, an encoder for --encoder, from SOURCE, a local folder of a BERT-like model of the transformers library."""
    with _working("exporting and comparing with torch"):
        least = export(source, out, int8=int8, max_tokens=max_tokens)
    click.echo(f"wrote {out}; least cosine with torch {least:.5f}")


def _encoder(folder: Path | None, cache: Path | None) -> Any:
    if cache is not None and folder is None:
        raise click.UsageError("--cache needs --encoder: n-grams are computed faster than read")
    if folder is None:
        return None
    encoder = sentence_encoder(folder)
    return encoder if cache is None else CachedEncoder(encoder, cache, encoder.fingerprint)


def _read(path: Path) -> Log:
    with _progress(f"reading {path.name}") as progress:
        task = progress.add_task(f"reading {path.name}", total=None)
        log = read_log(path, on_rows=lambda rows: progress.update(task, description=f"reading {path.name}, {rows:,} rows"))
    for group in spelt_alike(log.experts):
        click.echo(
            f"warning: treated as {len(group)} experts, but the names differ only in spelling: {', '.join(map(repr, group))}",
            err=True,
        )
    return log


@contextmanager
def _working(what: str) -> Iterator[None]:
    with _progress(what) as progress:
        progress.add_task(what, total=None)
        yield


def _progress(what: str) -> Progress:
    """A bar on a terminal; where nobody watches, one line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(what, err=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
