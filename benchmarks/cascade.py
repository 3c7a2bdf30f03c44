"""Where it pays to ask a small model first, and where it does not.  python -m benchmarks cascade [--models FOLDER]

Claim: judged on queries that nothing was learned from, asking first saves with confidence where the small model's
log-probabilities tell its right answers from its wrong ones and it costs little beside the other; elsewhere the held-out verdict
switches it off, and nothing is lost.

Two kinds of data.  Generated: 2,000 answers to learn from and 20,000 others to judge by, the small model right on two thirds,
the large on 92%, the router's estimate of the small one half as spread as the truth; right and wrong answers differ in the
logarithm of their mean surprise by `signal` standard deviations, and the large model costs `ratio` times as much.  Real: the two
language models of `deferral demo gateway` (trained on the spot, or found in --models), which answer 1,000 questions to learn from
and 1,000 others to judge by; log-probabilities are those of the small model's own tokens, prices the demo's lists, and the router
that of the demo.  Costs are in errors a query, 1 - quality + price / price of an error, gains paired over queries with half their
95% interval.
"""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Printed

from deferral.routing import Cascade, Confidence, Log, Outcome, Router, answers_in, confidence_of, fit_cascade
from deferral.routing.cascade import features
from deferral.routing.cascade_fitting import Answered

RESULTS = Path(__file__).parent / "results" / "cascade-cpu.json"
SIGNALS, RATIOS = (0.0, 0.5, 1.0, 2.0), (2, 10, 50)
LEARNED, JUDGED = 2_000, 20_000
PRICE = 1e-4
# Prices of an error, in units of the difference in price: at the first an error is worth twice that.
WORTH = (2.0, 5.0, 20.0)
_Z = 1.96
_AT_ONCE = 100


def made(rows: int, signal: float, ratio: float, *, seed: int) -> Answered:
    """Generated answers, as the docstring has them."""
    generator = np.random.default_rng(seed)
    chance = generator.beta(2, 1, rows)
    estimate = np.clip(np.column_stack([(chance + 2 / 3) / 2, np.full(rows, 0.92)]), 0, 1)
    quality = (generator.random((rows, 2)) < np.column_stack([chance, np.full(rows, 0.92)])).astype(float)
    mean = -np.exp(-1 - 0.5 * signal * (quality[:, 0] - 0.5) + 0.5 * generator.standard_normal(rows))
    tokens = generator.integers(5, 60, rows)
    sure = [
        Confidence(float(count), one, 3 * one, 2 * one, 1.5 * one, 0.7 * one) for count, one in zip(tokens, mean, strict=True)
    ]
    price = np.tile([PRICE, ratio * PRICE], (rows, 1))
    known = np.ones((rows, 2))
    return Answered(
        ("small", "large"), "small", features(sure), estimate, price, quality, price, known > 0, known, np.arange(rows)
    )


def judged(cascade: Cascade, rows: Answered, error: float) -> dict[str, Any]:
    """What the cascade does on new rows at a price of an error: as it is served, and if its verdict were not heard."""
    count, place = np.arange(len(rows)), cascade.place
    cost = 1 - rows.quality + rows.price / error
    alone = cost[count, (1 - rows.estimate + rows.expected / error).argmin(1)]
    action, _, _ = cascade.after(rows.confidence, rows.estimate, rows.expected, error)
    through = cost[count, action] + np.where(action != place, rows.price[:, place] / error, 0.0)
    first, going = cascade.before(rows.estimate, rows.expected, error)
    asks, used = first < going, cascade.why_not(error) == ""
    unheard = np.where(asks, through, alone)
    gains = {"served": alone - (unheard if used else alone), "unheard": alone - unheard, "always": alone - through}
    return {
        "price_of_error": float(error),
        "alone": float(alone.mean()),
        "always_large": float(cost[:, 1 - place].mean()),
        "used": used,
        "asked": float(asks.mean()),
        "deferred": float((asks & (action != place)).mean()),
        **{name: [float(gain.mean()), float(_Z * gain.std(ddof=1) / np.sqrt(len(gain)))] for name, gain in gains.items()},
    }


def generated(progress: Progress) -> Iterator[dict[str, Any]]:
    """Every signal with every ratio, at three prices of an error."""
    task = progress.add_task("generated answers", total=len(SIGNALS) * len(RATIOS))
    for signal in SIGNALS:
        for ratio in RATIOS:
            cascade, rows = fit_cascade(made(LEARNED, signal, ratio, seed=0)), made(JUDGED, signal, ratio, seed=1)
            for worth in WORTH:
                yield {"signal": signal, "ratio": ratio, **judged(cascade, rows, worth * (ratio - 1) * PRICE)}
            progress.advance(task)


def real(folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """The demo's models on questions of its own."""
    from deferral.demo.gateway import FITTING, MOST_QUESTIONS, made_models
    from deferral.demo.language import LanguageModel, Sampling
    from deferral.demo.questions import is_right, questions
    from deferral.demo.routed import PRICE_OF_ERROR, PRICES

    folder.mkdir(parents=True, exist_ok=True)
    drawn = questions(FITTING + MOST_QUESTIONS, seed=0)
    made_models(folder, 0, progress, unseen=drawn)
    asked = [drawn[row] for row in np.random.default_rng(0).permutation(len(drawn))]
    logs = [Log(), Log()]
    for name, (into, out) in PRICES.items():
        model = LanguageModel.load(folder / name)
        task = progress.add_task(f"asking the {name} model", total=len(asked))
        for start in range(0, len(asked), _AT_ONCE):
            some = asked[start : start + _AT_ONCE]
            prompts = [model.prompt([{"role": "user", "content": question.text}]) for question in some]
            steps: list[list[Any]] = [[] for _ in some]
            for row, step in model.steps(prompts, [Sampling(alternatives=5)] * len(some)):
                steps[row].append(step)
            for place, (question, prompt, written) in enumerate(zip(some, prompts, steps, strict=True), start):
                told = [step for step in written if step.text]
                sure = confidence_of([step.logprob for step in told], [[p for _, p in step.alternatives] for step in told])
                right = float(is_right("".join(step.text for step in told), question))
                dollars = (len(prompt) * into + len(written) * out) / 1e6
                logs[place >= FITTING].append(
                    Outcome(question.text, name, right, dollars, confidence=sure if name == "small" else None)
                )
            progress.advance(task, len(some))
    task = progress.add_task("learning from the first 1,000 questions", total=None)
    router = Router(PRICE_OF_ERROR).fit(logs[0])
    cascade = fit_cascade(answers_in(logs[0], router, "small"))
    progress.remove_task(task)
    rows = answers_in(logs[1], router, "small")
    accuracy = dict(zip(rows.experts, rows.quality.mean(0).tolist(), strict=True))
    errors = [PRICE_OF_ERROR * factor for factor in (0.25, 0.5, 1.0, 2.0, 5.0)]
    return [{"accuracy": accuracy, **judged(cascade, rows, error)} for error in errors]


@click.command()
@click.option("--models", type=click.Path(file_okay=False, path_type=Path), help="Where the demo's models are, or are to be.")
@click.option("--only", type=click.Choice(["generated", "real"]), help="One of the two.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
def command(models: Path | None, only: str | None, out: Path) -> None:
    """Gains over routing alone, on queries that nothing was learned from."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    with Progress() as progress:
        if only != "real":
            found["generated"] = list(generated(progress))
        if only != "generated":
            from deferral.demo.gateway import cache_folder

            found["real"] = real(models or cache_folder(), progress)
    found["machine"] = {
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "torch": version("torch"),
        "device": "cpu",
        "rows": {"learned": LEARNED, "judged": JUDGED},
    }
    show(found)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {out}")


def show(found: dict[str, Any]) -> None:
    """A table of each kind of data."""
    columns = ("$ an error", "alone", "used", "saved", "saved if always used", "saved if always asked first", "asked", "deferred")
    for kind, names in (("generated", ("signal", "ratio")), ("real", ())):
        table = Printed(*names, *columns, title=f"{kind}: errors a query", title_justify="left")
        for row in found.get(kind, ()):
            gains = [f"{row[name][0]:+.4f} ± {row[name][1]:.4f}" for name in ("served", "unheard", "always")]
            shares = (f"{row['asked']:.0%}", f"{row['deferred']:.0%}")
            cells = (f"{row['price_of_error']:.3g}", f"{row['alone']:.4f}", "yes" if row["used"] else "no", *gains, *shares)
            table.add_row(*(f"{row[name]:g}" for name in names), *cells)
        if table.row_count:
            Console(width=150).print(table)
