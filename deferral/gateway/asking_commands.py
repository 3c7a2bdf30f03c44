"""The commands `deferral gateway ask` and `deferral gateway grade`: they parse and print, and decide nothing."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deferral.command_line import Command, FiniteRange, callers_errors
from deferral.gateway.answer_files import read_questions
from deferral.gateway.asking import Result, ask_all
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.grading import Graded, by_field, by_judge, by_rule
from deferral.routing.grades import RULES
from deferral.routing.log_files import check_log_name, write_log
from deferral.routing.outcomes import Log

__all__ = ["ask", "grade"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)
_QUALITY = "quality"


def _fields(context: click.Context, parameter: click.Parameter, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f'expected a JSON object, such as {{"max_tokens": 500}}; {error}') from None
    if not isinstance(found, dict):
        raise click.BadParameter(f'expected a JSON object, such as {{"max_tokens": 500}}, got {text[:60]!r}')
    return found


def _or_no_limit(context: click.Context, parameter: click.Parameter, dollars: float | None) -> float:
    return math.inf if dollars is None else dollars


def _asking_options(command: Callable) -> Callable:
    for option in (
        click.option(
            "--dollars",
            "most_dollars",
            type=FiniteRange(min=0, min_open=True),
            callback=_or_no_limit,
            help="Stop asking once all replies together cost this many dollars.  [default: no limit]",
        ),
        click.option(
            "--concurrent",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="How many questions one expert is asked at a time.",
        ),
        click.option(
            "--request",
            "fields",
            metavar="JSON",
            default="{}",
            callback=_fields,
            help='Fields to add to every request, such as {"max_tokens": 500}.',
        ),
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@click.argument("questions", type=_FILE)
@click.argument("answers", type=_NEW)
@click.option("--experts", "file", type=_FILE, required=True, help="The experts file, as for `deferral serve`.")
@click.option("--only", multiple=True, metavar="EXPERT", help="Ask only EXPERT; may be given several times.")
@_asking_options
def ask(
    questions: Path,
    answers: Path,
    file: Path,
    only: tuple[str, ...],
    **how: Any,
) -> None:
    """Ask every expert every question in QUESTIONS, and add the answers to ANSWERS (.jsonl); `grade` makes a log of them.

    QUESTIONS is .jsonl, each line with a "query" (or "messages") and, where they are known, a "reference" and "tags"; or a text
    file with one question per line.  If the command is stopped or killed, or some questions are not answered, run it again: it
    asks what is missing, and exits with 3 as long as something is.  Experts with `route = false` are asked only if --only names
    them.
    """
    if answers.exists() and answers.samefile(questions):
        raise click.UsageError(f"{answers} holds the questions; name another file for the answers")
    experts = _chosen(read_experts(file), only)
    asked = read_questions(questions)
    title = f"asking {', '.join(each.name for each in experts)}"
    with _progress(title, len(asked) * len(experts)) as on_answer, callers_errors():
        result = ask_all(asked, experts, answers, on_answer=on_answer, **how)
    click.echo(f"{answers}: {result.answers:,} answers, ${result.dollars:.4g}; {result.asked:,} of them from this run")
    _say_missing(result)


@click.command(cls=Command)
@click.argument("answers", type=_FILE)
@click.argument("log", type=_NEW)
@click.option(
    "--by",
    "rule",
    type=click.Choice([*RULES, _QUALITY]),
    help="Compare with the reference (the whole answer, the words in it, the letter or the number), or take the field "
    "quality that a program of yours has added to ANSWERS.",
)
@click.option("--judge", metavar="EXPERT", help="Instead of --by, have EXPERT of the experts file say how good each answer is.")
@click.option("--experts", "file", type=_FILE, help="The experts file; needed with --judge.")
@click.option("--replace", is_flag=True, help="Overwrite LOG if it exists.")
@_asking_options
def grade(
    answers: Path,
    log: Path,
    rule: str | None,
    judge: str | None,
    file: Path | None,
    replace: bool,
    **how: Any,
) -> None:
    """Say how good each answer is, and write the log that `deferral route fit` learns from (.jsonl, .ndjson or .parquet).

    What a judge says is kept beside the log, in LOG.EXPERT.jsonl.  If the command is stopped, or the judge leaves out an answer,
    run it again (with --replace): it asks for what is missing, and exits with 3 as long as something is.
    """
    if (rule is None) == (judge is None):
        raise click.UsageError("expected either --by or --judge")
    if (judge is None) != (file is None):
        raise click.UsageError("--judge and --experts go together")
    if log.exists() and log.samefile(answers):
        raise click.UsageError(f"{log} holds the answers; name another file for the log")
    if log.exists() and not replace:
        raise click.UsageError(f"{log} already exists; name another file for the log, or add --replace")
    # Before anybody is paid.
    check_log_name(log)
    result = None
    if judge is not None and file is not None:
        [expert] = _chosen(read_experts(file), (judge,))
        verdicts = log.with_name(f"{log.name}.{re.sub(r'[^A-Za-z0-9.]+', '-', judge)}.jsonl")
        with _progress(f"{judge} is grading", None) as on_answer, callers_errors():
            graded, result = by_judge(answers, expert, verdicts, on_answer=on_answer, **how)
    elif rule == _QUALITY:
        graded = by_field(answers)
    else:
        assert rule is not None
        graded = by_rule(answers, rule)
    write_log(graded.log, log)
    Console().print(_table(graded))
    if rule in RULES and not graded.log.column("quality").any():
        click.echo(f"no answer agrees with its reference: is {rule} the right rule?", err=True)
    click.echo(f"wrote {log}; next: deferral route fit {log} --out router --price-of-error DOLLARS")
    if result is not None:
        click.echo(f"the judge's replies cost ${result.dollars:.4g}")
        _say_missing(result)


def _chosen(experts: dict[str, Expert], only: tuple[str, ...]) -> list[Expert]:
    if unknown := [name for name in only if name not in experts]:
        raise click.BadParameter(f"{unknown[0]!r} is not in the experts file; it has {', '.join(experts)}")
    chosen = [each for each in experts.values() if (each.name in only if only else each.route)]
    if not chosen:
        raise click.UsageError("every expert has route = false; name those to ask with --only")
    return chosen


def _say_missing(result: Result) -> None:
    for name, count in result.cut.items():
        if count:
            click.echo(f"{name}: {count:,} answers were cut off at the most tokens allowed; --request sets max_tokens", err=True)
    for name, reasons in result.left.items():
        for why, count in reasons.most_common(5):
            click.echo(f"{name}: {count:,} not answered: {why}", err=True)
    if result.missing:
        click.echo(f"{result.missing:,} answers are missing; the same command asks for them again", err=True)
        sys.exit(3)


def _table(graded: Graded) -> Table:
    table = Table("expert", "answers", "not graded", "quality", "$ per 1,000", "tokens out", box=None)
    log: Log = graded.log
    expert, quality, price, written = (log.column(name) for name in ("expert", "quality", "price", "output_tokens"))
    for code, name in enumerate(log.experts):
        mine = expert == code
        counted = written[mine & ~np.isnan(written)]
        tokens = f"{np.mean(counted):.0f}" if len(counted) else ""
        figures = (f"{np.mean(quality[mine]):.3f}", f"{1000 * np.mean(price[mine]):.4g}", tokens)
        table.add_row(escape(name), f"{mine.sum():,}", f"{graded.left_out[name]:,}", *figures)
    for name in sorted(set(graded.left_out) - set(log.experts)):
        table.add_row(escape(name), "0", f"{graded.left_out[name]:,}", "", "", "")
    return table


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[Result], None]]:
    """A bar on a terminal; where nobody watches, a line to begin with."""
    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(what, err=True)
        yield lambda result: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def on_answer(result: Result) -> None:
            unanswered = f", {result.missing:,} not answered" if result.missing else ""
            progress.update(task, completed=result.answers, description=f"{what}: ${result.dollars:.4g}{unanswered}")

        yield on_answer
