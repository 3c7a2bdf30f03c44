"""Routers on real outcomes of language models, beside peers' published and measured figures.  python -m benchmarks routing

Every table is cross-fitted: the test fold of a row is never seen by any choice made for it, not by the blend, its weights, the
trust in it, nor the verdict to use it.  Folds are random (seed 0) or whole subjects.  Curves are pooled over the folds; intervals
are 95% bootstrap intervals over the test rows, or over subjects where whole subjects are held out: what they say of subjects to
come.  Some queries stand in the data more than once; how many of them another fold holds too is printed under the table.

What the design has seen.  It was chosen on the design rows: those outside the first random test fold of RouteLLM's and
LLMRouter's data, in random folds and in folds of whole subjects (one early trial saw all of RouteLLM's).  They are test rows of
the other folds: what is learned is blind to the test rows, the design as a whole is not.  MMLU-Pro was not looked at before its
tables.

Changed because of what tables of test rows showed, and compared on the design rows, but where it says otherwise:
- LLMRouter's held-out tasks: trust from ten large clusters, not forty, by an encoder refitted without them; weights for new
  subjects apart, without networks (for speed); only the lower end of their interval is relied on (compared on no rows).
- RouteLLM's 1,500 rows: weights shrink to equal ones; one estimator replaces the blend only if cheaper with confidence; the
  verdict is by agreement over all trade-offs (RouterBench's first table asked for that, too; in its last form on no other rows).
- The rejector, which lost everywhere: its scores take prices by a formula.
- MMLU-Pro: prices are foreseen from neighbours (on the rows outside the first random test fold of it and RouterBench).
- Heads of four networks each: no better in the blend, up and down in the tables; dropped.
- Who leaves the blend: by errors (on such rows of MMLU-Pro, too); of many rows alone, as RouteLLM's 1,500 lost by it (on 1,500
  random design rows).

Set for speed: 6,000 cross-fitted rows and 20 passes of networks (compared on no rows); neighbours by 64 numbers among 512 rows
(on 1,000 random rows of the two, no change beyond noise); then all tables were run once more.

With --encoder a sentence encoder's vectors stand in place of the n-grams; both together gained nothing on RouteLLM's design
rows.

APGR: average performance gap recovered, the mean over the folds (pooled: of all rows at once).  Which subjects share a fold moves
it by some .02: length alone scores .53 to .58 on four draws of them.  AIQ: average quality over the prices from the cheapest to
the dearest expert.  saving: what is saved at the quality of the best single expert; reached: the share of resamples in which that
quality is reached at all, its interval is of these.  routed: `Router` as it comes, with its fallback; learned: the same without.
rejector: the network trained by the two-stage deferral loss; over rejector, over neighbours, over static: paired differences.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

from benchmarks.harness.running import commit, data_folder
from benchmarks.routers.data import (
    FOLDS,
    SEED,
    Data,
    lines_of,
    llmrouter,
    mmlu_pro,
    random_folds,
    routellm,
    routerbench,
    subject_folds,
)
from benchmarks.routers.partial_logs import partial_logs
from benchmarks.routers.pricing import MIX, RESAMPLES, figure, priced_figures, settings
from deferral.intervals import bootstrap, interval
from deferral.routing.cached_encoder import CachedEncoder
from deferral.routing.evaluation import PriceQualityCurve, apgr, best_expert, cpt, curve, static_curve
from deferral.routing.held_out import POLICIES, taught
from deferral.routing.judging import SHARES
from deferral.routing.policies import Factors, Policy, Rejector, expert_means
from deferral.routing.router import Router
from deferral.routing.sentences import sentence_encoder
from deferral.routing.vectors import Vectors

RESULTS = Path(__file__).parent / "results"
SENTENCES = "-sentences"  # in the names of results with a sentence encoder
Encode = Callable[[list[str]], Any]
# The estimators of the router, and others that it does without.
OTHERS: dict[str, Callable[[], Policy]] = {"factors": Factors, "rejector linear": lambda: Rejector(hidden=0)}
# Of whole subjects: which of them share a fold moves RouteLLM's figures by more than any method does.
OTHER_DRAWS = (1, 2, 3)
LEARNERS = (
    "linear", "neighbours", "clusters", "heads", "features", "factors", "rejector linear", "rejector", "learned", "routed",
)  # fmt: skip
PEERS = {
    "routellm": "measured with MiniLM vectors: logistic on 'small is right' .587, matrix factorisation .601, kNN .666, MLP .668, "
    "true subject .674, blend by hand .682",
    "routellm-1500": "RouteLLM's published best .603; with MiniLM vectors: MLP .647, blend .640",
    "routellm-subjects": "with MiniLM vectors: as RouteLLM .497, length .583, kNN .597, blend .607",
    **{f"routellm-subjects-{draw}": "other folds of whole subjects: see routellm-subjects" for draw in OTHER_DRAWS},
    "llmrouter": "with MiniLM vectors: saving of comp-sum fitted per trade-off 53%, kNN shrunk 64%, 64 clusters 66%; AIQ .632, "
    "static mix .586",
    "llmrouter-tasks": "with MiniLM vectors: every learned method at most AIQ .576, static mix .586",
    "mmlu-pro": "with MiniLM vectors and other prices: static mix .668, kNN shrunk .681",
    "mmlu-pro-categories": "with MiniLM vectors and other prices: kNN shrunk .664, static mix .668",
    "routerdc": "best single 54.56, fine-tuned encoder 58.54, 16 clusters 58.6 (chosen on test), best model per true task 58.67",
    "routerbench": "",
    "partial-logs": "",
}


@dataclass
class Predicted:
    """What the methods say of every row, from folds that did not see it."""

    estimates: dict[str, np.ndarray]  # method: (N, E)
    errors: np.ndarray  # (S,)
    price: np.ndarray  # (N, E), as predicted before the answer
    routed: np.ndarray  # (S, N) whom the router asks at every price of an error
    fallback: np.ndarray  # (S, N) bool
    static: np.ndarray  # (S, N) the single expert of the training folds
    seconds: dict[str, float]


def every_policy() -> list[tuple[str, Callable[[], Policy]]]:
    """Those of the router, then the others."""
    return [*((make().kind, make) for make in POLICIES), *OTHERS.items()]


def predicted(data: Data, fold: np.ndarray, *, train_rows: int | None = None, encode: Encode | None = None) -> Predicted:
    """All methods on all folds."""
    rows = len(data.quality)
    errors = settings(data.price)
    shape = (len(errors), rows)
    result = Predicted(
        {}, errors, np.empty(data.price.shape), np.zeros(shape, int), np.zeros(shape, bool), np.zeros(shape, int), {}
    )
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if train_rows is not None:
            train = np.sort(np.random.default_rng(number).choice(train, train_rows, replace=False))
        table = data.table(train)
        begun = time.perf_counter()
        router = Router(1.0, encoder=encode, policies=POLICIES, seed=SEED).fit(table)
        result.seconds["routed"] = result.seconds.get("routed", 0) + time.perf_counter() - begun
        queries = [data.queries[row] for row in test]
        seen, unseen = router.encoder(table.queries), router.encoder(queries)
        quality, means = table.quality, expert_means(table.quality, np.ones_like(table.quality))

        def put(name: str, values: np.ndarray, test: np.ndarray = test) -> None:
            result.estimates.setdefault(name, np.zeros(data.price.shape))[test] = values

        known = {policy.kind: policy for policy in router.fitted.policies}
        for name, make in every_policy():
            begun = time.perf_counter()
            policy = known.get(name) or taught(make(), seen, quality, means, table.price, seed=SEED)
            put(name, means + policy.deviations(unseen))
            result.seconds[name] = result.seconds.get(name, 0) + time.perf_counter() - begun
        put("length", means + by_length(seen, quality - means, unseen))
        put("true subject", by_subject(data.subject[train], quality, data.subject[test], means))
        estimated = router.fitted.estimate(unseen)
        put("learned", estimated.quality)
        result.price[test] = router.fitted.priced(np.array([len(query) for query in queries], float), estimated.dearness)
        for place, error in enumerate(errors):
            decisions = router.decide_estimated(router.plan(price_of_error=float(error)), estimated, queries)
            result.routed[place, test], result.fallback[place, test] = decisions.actions, decisions.fallback
            result.static[place, test] = router.plan(price_of_error=float(error), learned=False).mix.argmax()
    return result


def by_length(seen: Vectors, gain: np.ndarray, unseen: Vectors) -> np.ndarray:
    """A cubic in the logarithm of the query's length."""

    def powers(vectors: Vectors) -> np.ndarray:
        return vectors.extra[:, :1] ** np.arange(4)

    return powers(unseen) @ np.linalg.lstsq(powers(seen), gain, rcond=None)[0]


def by_subject(train: np.ndarray, quality: np.ndarray, test: np.ndarray, means: np.ndarray) -> np.ndarray:
    known = {name: quality[train == name].mean(0) for name in np.unique(train)}
    return np.stack([known.get(name, means) for name in test])


def resamples_of(figure: Callable[[Tensor], Tensor], unit: np.ndarray) -> Tensor:
    """A figure of the rows' weights on samples of the units, each with all of its rows.  (N,) -> (RESAMPLES, ...)"""
    member = torch.from_numpy(np.unique(unit, return_inverse=True)[1])
    return bootstrap(lambda weights: figure(weights[:, member]), int(member.max()) + 1, resamples=RESAMPLES, seed=SEED)


def two_models(data: Data, fold: np.ndarray, unit: np.ndarray, found: Predicted) -> Iterator[dict]:
    """APGR and CPT, the mean over the folds."""
    gain = data.quality[:, 1] - data.quality[:, 0]
    scores = {name: estimate[:, 1] - estimate[:, 0] for name, estimate in found.estimates.items()}
    # A decision is no score: how cheap an error may be and gpt4 is still asked is one.
    scores["routed"] = (found.routed == 1).sum(0).astype(float)
    scores["random"] = np.zeros(len(gain))
    scores["oracle"] = gain

    def mean_apgr(name: str) -> Callable[[Tensor], Tensor]:
        def of_weights(weights: Tensor) -> Tensor:
            parts = [apgr(scores[name][fold == n], gain[fold == n], weights[:, fold == n].numpy()) for n in range(FOLDS)]
            return torch.from_numpy(np.mean(parts, axis=0))

        return of_weights

    resampled = {name: resamples_of(mean_apgr(name), unit) for name in scores}
    one = torch.ones(1, len(gain), dtype=torch.float64)
    estimates = {name: float(mean_apgr(name)(one)) for name in scores}
    for name in ("random", "length", "true subject", *LEARNERS, "oracle"):
        estimate, samples = estimates[name], resampled[name]
        calls = [np.mean([cpt(scores[name][fold == n], gain[fold == n], share) for n in range(FOLDS)]) for share in (0.5, 0.8)]
        yield {
            "method": name,
            **figure("APGR", estimate, samples),
            **figure("over_neighbours", estimate - estimates["neighbours"], samples - resampled["neighbours"]),
            **figure("over_rejector", estimate - estimates["rejector"], samples - resampled["rejector"]),
            "CPT50": float(calls[0]),
            "CPT80": float(calls[1]),
            "APGR_pooled": float(apgr(scores[name], gain)),
            "APGR_fold_0": float(apgr(scores[name][fold == 0], gain[fold == 0])),
            **({"fallback": float(found.fallback.mean())} if name == "routed" else {}),
        }


def priced(data: Data, fold: np.ndarray, unit: np.ndarray, found: Predicted) -> Iterator[dict]:
    """AIQ and saving of the pooled curves."""
    rows = np.arange(len(data.quality))
    curves = {
        name: curve(estimate, data.price, data.quality, found.errors, expected=found.price)
        for name, estimate in found.estimates.items()
    }
    for name, actions in {"routed": found.routed, MIX: found.static}.items():
        curves[name] = PriceQualityCurve(data.price[rows, actions], data.quality[rows, actions])
    curves["static mix"] = static_curve(data.price, data.quality)
    oracle = curve(data.quality, data.price, data.quality, found.errors)
    curves["oracle"] = oracle
    best = best_expert(data.quality, data.price)

    figures = {name: priced_figures(one, data, best) for name, one in curves.items()}
    resampled = {name: resamples_of(one, unit) for name, one in figures.items()}
    one = torch.ones(1, len(rows), dtype=torch.float64)
    estimates = {name: of(one)[0].tolist() for name, of in figures.items()}
    for name in ("static mix", MIX, "length", "true subject", *LEARNERS, "oracle"):
        estimate, samples = estimates[name][0], resampled[name][:, 0]
        saved = [interval(estimates[name][place], resampled[name][:, place]) for place in range(1, 1 + len(SHARES))]
        yield {
            "method": name,
            **figure("AIQ", estimate, samples),
            **figure("over_static", estimate - estimates[MIX][0], samples - resampled[MIX][:, 0]),
            **figure("over_rejector", estimate - estimates["rejector"][0], samples - resampled["rejector"][:, 0]),
            **{f"saving_{round(100 * share)}": part.estimate for share, part in zip(SHARES, saved, strict=True)},
            "saving_100_interval": [saved[0].low, saved[0].high],
            "saving_100_reached": float((~resampled[name][:, 1].isnan()).double().mean()),
            **(
                {"fallback": float(found.fallback.mean()), "fallback_by_row": float(found.fallback.all(0).mean())}
                if name == "routed"
                else {}
            ),
        }


def routerdc(folder: Path, encode: Encode | None) -> Iterator[dict]:
    """Mean score over five tasks at no price, everything chosen on the train parts."""
    rows = lines_of(folder / "routerdc_7model_prompts.jsonl.gz")
    with np.load(folder / "routerdc_7model_outcomes.npz") as stored:
        score, names = stored["score"].astype(np.float32), stored["models"].tolist()
        subset = stored["subset_names"][stored["subset"]]
    queries = [row["question"] for row in rows]
    train = np.flatnonzero([name.endswith("train") for name in subset])
    test = np.flatnonzero([name.endswith("test") for name in subset])
    # Queries that are in both parts would be known by heart.
    known = {queries[row] for row in train}
    task = np.array([name.removesuffix("_test").removesuffix("-test") for name in subset])[test]
    data = Data(queries, names, score, np.zeros(score.shape), subset)
    weight = np.mean([(task == name) / (task == name).sum() for name in np.unique(task)], axis=0)
    table = data.table(train)
    means = expert_means(table.quality, np.ones_like(table.quality))
    chosen: dict[str, np.ndarray] = {"best single of train": np.full(len(test), means.argmax())}
    router = Router(1.0, encoder=encode, policies=POLICIES, seed=SEED).fit(table)
    seen, unseen = router.encoder(table.queries), router.encoder([queries[row] for row in test])
    learned = {policy.kind: policy for policy in router.fitted.policies}
    for name, make in every_policy():
        policy = learned.get(name) or taught(make(), seen, table.quality, means, table.price, seed=SEED)
        chosen[name] = (means + policy.deviations(unseen)).argmax(1)
    chosen["learned"] = router.fitted.estimate(unseen).quality.argmax(1)
    chosen["routed"] = router.route_batch([queries[row] for row in test]).actions
    true = {
        name: score[train][np.array([n.startswith(name) for n in subset[train]])].mean(0).argmax() for name in np.unique(task)
    }
    chosen["best of train per true task"] = np.array([true[name] for name in task])
    chosen["oracle"] = score[test].argmax(1)
    for name, actions in chosen.items():
        got = torch.from_numpy(score[test, actions].astype(float))
        cells = torch.from_numpy(weight)

        def mean(weights: Tensor, got: Tensor = got) -> Tensor:
            parts = [
                (weights * (task == n)) @ got / (weights @ torch.from_numpy((task == n).astype(float))) for n in np.unique(task)
            ]
            return torch.stack(parts).mean(0)

        score_of_all = figure("score", float(cells @ got), bootstrap(mean, len(test), resamples=RESAMPLES, seed=SEED))
        by_task = {n: float(got[torch.from_numpy(task == n)].mean()) for n in np.unique(task)}
        yield {"method": name, **score_of_all, **by_task}
    yield {"method": "(test queries that are in train)", "score": float(np.mean([queries[row] in known for row in test]))}


TABLES: dict[str, tuple] = {
    "routellm": (routellm, random_folds, two_models, None),
    "routellm-1500": (routellm, random_folds, two_models, 1500),
    "routellm-subjects": (routellm, subject_folds, two_models, None),
    "llmrouter": (llmrouter, random_folds, priced, None),
    "llmrouter-tasks": (llmrouter, subject_folds, priced, None),
    "routerbench": (routerbench, random_folds, priced, None),
    "mmlu-pro": (mmlu_pro, random_folds, priced, None),
    "mmlu-pro-categories": (mmlu_pro, subject_folds, priced, None),
    **{f"routellm-subjects-{draw}": (routellm, partial(subject_folds, seed=draw), two_models, None) for draw in OTHER_DRAWS},
}


def in_another_fold(queries: list[str], fold: np.ndarray) -> float:
    """The share of the rows whose query, word for word, stands in another fold too."""
    folds: dict[str, set[int]] = {}
    for query, number in zip(queries, fold.tolist(), strict=True):
        folds.setdefault(query, set()).add(number)
    return float(np.mean([len(folds[query]) > 1 for query in queries]))


def run(name: str, folder: Path, encode: Encode | None) -> tuple[list[dict], dict]:
    """The lines of a table, and what else is to be known of it."""
    if name == "routerdc":
        return list(routerdc(folder, encode)), {}
    if name == "partial-logs":
        return list(partial_logs(folder)), {}
    read, fold_of, judge, train_rows = TABLES[name]
    data = read(folder)
    whole_subjects = fold_of is not random_folds
    fold = fold_of(data.subject) if whole_subjects else random_folds(len(data.queries))
    unit = data.subject if whole_subjects else np.arange(len(fold))
    found = predicted(data, fold, train_rows=train_rows, encode=encode)
    about = {
        "resampled": f"{len(np.unique(data.subject))} subjects" if whole_subjects else "rows",
        "queries_in_another_fold": round(in_another_fold(data.queries, fold), 4),
        "fit_seconds": {method: round(value, 1) for method, value in found.seconds.items()},
    }
    return list(judge(data, fold, unit, found)), about


def show(name: str, lines: list[dict], about: dict) -> None:
    keys = [key for key in lines[0] if not key.endswith("_interval")]
    keys += [key for line in lines for key in line if key not in keys and not key.endswith("_interval")]
    table = Printed(title=name, box=None, header_style="bold", title_justify="left")
    for key in dict.fromkeys(keys):
        table.add_column(key.replace("_", " "), justify="left" if key == "method" else "right", no_wrap=True)
    for line in lines:
        cells = []
        for key in dict.fromkeys(keys):
            value, ends = line.get(key, ""), line.get(f"{key}_interval")
            text = value if isinstance(value, str) else "none" if value is None else f"{value:.4f}"
            cells.append(f"{text} [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else text)
        table.add_row(*cells)
    Console(width=240).print(table)
    if about:
        twice = f"{about['queries_in_another_fold']:.2%} of the queries stand in another fold too"
        Console(width=240).print(f"intervals over {about['resampled']}; {twice}", highlight=False)
    if PEERS[name]:
        Console(width=240).print(f"peers: {PEERS[name]}\n", highlight=False)


def strict(value: Any) -> Any:
    """None where a figure does not exist, which JSON has no number for; an interval with such an end is None as a whole."""
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, list):
        parts = [strict(part) for part in value]
        return None if value and all(isinstance(part, float) for part in value) and None in parts else parts
    return None if isinstance(value, float) and not np.isfinite(value) else value


EVERY = (*TABLES, "routerdc", "partial-logs")
# What a sentence encoder says of a log of single answers is no other question than what it says of a full table.
WITH_SENTENCES = (*TABLES, "routerdc")


def cached(folder: Path) -> CachedEncoder:
    """The sentence encoder of a folder; vectors are kept, so that a run that was stopped goes on, and tables share them."""
    encoder = sentence_encoder(folder)
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deferral" / "routing-vectors"
    return CachedEncoder(encoder, place, encoder.fingerprint)


@click.command()
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), envvar="DEFERRAL_DATA", help="Folder of the data.")
@click.option("--only", multiple=True, type=click.Choice(EVERY), help="Some of the tables.  [default: all]")
@click.option(
    "--encoder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a sentence encoder: the tables with its vectors in place of n-grams.",
)
@click.option("--summary", is_flag=True, help="Run nothing; print the results that are there beside the targets.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder of the results.")
def command(root: Path | None, only: tuple[str, ...], encoder: Path | None, summary: bool, out: Path) -> None:
    """Routers on real outcomes, beside peers' figures."""
    from benchmarks.routers.targets import show_targets

    if summary:
        show_targets(out)
        return
    root = data_folder(root)
    if encoder is not None and "partial-logs" in only:
        raise click.UsageError("partial-logs has n-grams alone; leave out --encoder, or name other tables")
    torch.set_num_threads(1)
    encode = None if encoder is None else cached(encoder)
    for name in only or (EVERY if encode is None else WITH_SENTENCES):
        begun = time.perf_counter()
        lines, about = run(name, root / "llm", encode)
        lines = strict(lines)
        show(name, lines, about)
        record = {
            "command": f"python -m benchmarks routing --only {name}" + ("" if encode is None else " --encoder FOLDER"),
            **({} if encode is None else {"encoder": encode.fingerprint}),
            "commit": commit(),
            "device": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "numpy", "scipy", "scikit-learn")},
            "seed": SEED,
            "folds": FOLDS,
            "resamples": RESAMPLES,
            "wall_seconds": round(time.perf_counter() - begun, 1),
            **about,
            "peers": PEERS[name],
            "lines": lines,
        }
        path = out / f"routing-{name}{'' if encode is None else SENTENCES}.json"
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        click.echo(f"wrote {path.name}")
    show_targets(out)
