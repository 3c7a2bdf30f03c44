"""`deferral route`: learn from a log which language model should answer.  Parses and prints, decides nothing."""

import difflib
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from deferral.command_line import Commands, FiniteRange, callers_errors
from deferral.routing.batches import route_file
from deferral.routing.cascade_fitting import add_cascade
from deferral.routing.options import FILE, FOLDER, NEW, POSITIVE, encoder_of, encoder_options, setting_of, setting_options
from deferral.routing.outcomes import Log
from deferral.routing.persistence import check_place, check_unchanged, keep_previous, previous_of, written
from deferral.routing.prices import read_prices, token_prices
from deferral.routing.progress import progress, reading, working
from deferral.routing.router import Router
from deferral.routing.showing import show_explanation

__all__ = ["route"]

# Judging needs torch, for which the other commands must not wait.
_ELSEWHERE = {
    "evaluate": (
        "deferral.routing.judging_commands",
        "Judge routing on a LOG in which every expert answered every query.",
    ),
    "simulate": (
        "deferral.routing.judging_commands",
        "Replay LOG under the router, and under each expert alone: what would it have cost, by three off-policy estimates?",
    ),
}
_RARE = 20  # outcomes of an expert


class _Route(Commands):
    def invoke(self, context: click.Context) -> Any:
        with callers_errors():
            return super().invoke(context)


@click.group(cls=_Route, elsewhere=_ELSEWHERE)
def route() -> None:
    """Learn from a log which language model should answer, and prove what that saves."""


@route.command()
@click.argument("log", type=FILE)
@click.option("--out", "-o", type=NEW, required=True, help="Folder for the router; one that is there is kept as FOLDER.previous.")
@click.option("--price-of-error", type=POSITIVE, required=True, help="What a wrong answer is worth, in dollars.")
@encoder_options
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
    type=FILE,
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
    """Learn a router from LOG (.jsonl, .ndjson, .parquet or .csv), and report what it is worth on held-out queries."""
    # Before the work, not after it.
    check_place(out)
    before, previous = written(out), previous_of(out)
    if before:
        check_place(previous)
    outcomes = reading(log)
    _warn_of_rare(outcomes)
    price_model = None if prices is None else token_prices(outcomes, read_prices(prices))
    router = Router(price_of_error, encoder=encoder_of(encoder, cache), explore=explore, seed=seed)
    counts = np.bincount(outcomes.column("expert"), minlength=len(outcomes.experts)).tolist()
    of_each = ", ".join(f"{count:,} outcomes of {name}" for name, count in zip(outcomes.experts, counts, strict=True))
    with working(f"fitting on {len(outcomes.queries):,} queries: {of_each}"):
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
@click.argument("query")
@setting_options
@encoder_options
@click.option(
    "--count", type=click.IntRange(min=0), default=5, show_default=True, help="How many of the nearest logged queries to show."
)
def explain(query: str, folder: Path, encoder: Path | None, cache: Path | None, count: int, **options: Any) -> None:
    """Say whom the router asks, what it expects of every expert, and which logged queries are nearest.

    Similarity to the log is the mean cosine with the ten nearest logged queries, lowered (but not with a sentence encoder) if the
    words of the query are rare in the log.  The number before each logged query is its cosine, not lowered, so it is usually
    larger.
    """
    router = Router.load(folder, encoder=encoder_of(encoder, cache))
    show_explanation(*router.explain(query, count=count, **setting_of(options)))


@route.command()
@click.argument("queries", metavar="IN", type=FILE)
@click.argument("out", type=NEW)
@setting_options
@click.option("--encoder", type=FOLDER, help="Folder of the sentence encoder that the router was fitted with.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes.")
def batch(queries: Path, out: Path, folder: Path, encoder: Path | None, workers: int, **options: Any) -> None:
    """Route a file of queries: IN is .jsonl, .ndjson (objects with "query") or text, one query a line; OUT one decision a line.

    If it was stopped or killed, the same command continues where it was; once OUT is complete, it does nothing.
    """
    there = out.exists()
    with progress(f"routing {queries.name}") as bar:
        task = bar.add_task("routing", total=queries.stat().st_size)

        def on_rows(rows: int, read: int) -> None:
            bar.update(task, completed=read, description=f"{rows:,} queries routed")

        rows = route_file(folder, queries, out, setting=setting_of(options), encoder=encoder, workers=workers, on_rows=on_rows)
    if there:
        click.echo(f"{out} is complete, a decision for each query of {queries}; remove it to route them again")
    else:
        click.echo(f"wrote {out}, {rows:,} decisions")


@route.command()
@click.argument("log", type=FILE)
@click.option("--router", "-r", "folder", type=FOLDER, required=True, help="Folder of the router that gets the cascade.")
@click.option("--first", required=True, metavar="EXPERT", help="The expert that answers first.")
@encoder_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def cascade(log: Path, folder: Path, first: str, encoder: Path | None, cache: Path | None, seed: int) -> None:
    """Learn when to keep the answer of an expert that is asked first, and when to ask another after it.

    The outcomes of EXPERT in LOG need a confidence: numbers computed from the log-probabilities of its answers.  The router gets
    the cascade only if it pays on held-out queries at some price of an error; if not, nothing changes and the exit status is 3.
    """
    outcomes, encode = reading(log), encoder_of(encoder, cache)
    with progress("learning when to defer") as bar:
        task = bar.add_task("learning when to defer", total=None)

        def on_fold(done: int, of: int) -> None:
            bar.update(task, description=f"estimates of routers that did not see the query, {done + 1} of {of}")

        def on_answers(count: int) -> None:
            bar.update(task, description=f"learning from {count:,} answers of {first} when to defer")

        found, error = add_cascade(folder, outcomes, first, encoder=encode, seed=seed, on_fold=on_fold, on_answers=on_answers)
    click.echo(found.report(error))
    if not found.paid.pays:
        click.echo(f"{folder} stays as it was")
        sys.exit(3)
    click.echo(f"wrote {folder}; a gateway uses it once it is reloaded")


@route.command()
@click.option("--router", "-r", "folder", type=FOLDER, required=True, help="Folder of the router.")
@click.option("--price-of-error", type=POSITIVE, required=True, help="What a wrong answer is worth from now on, in dollars.")
@click.option("--encoder", type=FOLDER, help="Folder of the sentence encoder that the router was fitted with, if it was.")
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
@click.argument("source", type=FOLDER)
@click.argument("out", type=NEW)
@click.option("--int8", is_flag=True, help="Quantise the weights: faster, but the vectors are slightly off.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    help="How many tokens of a query the encoder reads.  [default: 128, or all the model takes if that is fewer]",
)
def export_encoder(source: Path, out: Path, int8: bool, max_tokens: int | None) -> None:
    """Make OUT, an encoder for --encoder, from SOURCE, a local folder of a BERT-like model of the transformers library."""
    # Imported here: it needs torch.
    from deferral.routing.onnx_export import export

    with working("exporting and comparing with torch"):
        least = export(source, out, int8=int8, max_tokens=max_tokens)
    click.echo(f"wrote {out}; least cosine with torch {least:.5f}")
