"""Routers on real outcomes of language models, beside peers' published and measured figures.  python -m benchmarks routing

Every table is cross-fitted: the test fold of a row is never seen by any choice made for it, not by the blend, its weights, the
trust in it, nor the verdict to use it.  Folds are random (seed 0) or whole subjects.  Curves are pooled over the folds; intervals
are 95% bootstrap intervals over the test rows.

How the design came about: features, penalties and the sizes of the estimators were compared by cross-validation on the rows
outside the first random test fold of RouteLLM's and LLMRouter's data (one early trial with other folds saw all rows of
RouteLLM's).  Those rows are test rows of the other four folds, so the design as a whole is not blind to them; what is learned is.
Some choices came after tables of test rows had been printed once: after LLMRouter's held-out tasks, that trust is learned from
ten large clusters and not forty (compared on the rows above); after RouteLLM's 1,500 rows, that blending weights are shrunk
towards equal ones, that a single estimator replaces the blend only if it is cheaper with confidence, and that a gain over all
prices of an error counts as confidence at each of them.  MMLU-Pro and RouterBench were not looked at before their tables.

APGR: average performance gap recovered, the mean over the folds (pooled: of all rows at once).  Which subjects share a fold moves
it by some .02: length alone scores .53 to .58 on four draws of them.  AIQ: average quality over the prices from the cheapest to
the dearest expert.  saving: what is saved at the quality of the best single expert.  routed: `Router` as it comes, with its
fallback; learned: the same without fallback.  MMLU-Pro: prices are those of models of the same size in the price lists of
RouterArena and LLMRouter, tokens are characters / 4; DeepSeek-Coder-V2 and 32 questions with gaps are left out.
"""

import gzip
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

from deferral.intervals import bootstrap, interval
from deferral.routing.encoders import NgramEncoder, Vectors
from deferral.routing.evaluation import Curve, aiq, apgr, best_expert, cpt, curve, saving, static_curve, trade_offs
from deferral.routing.outcomes import Table
from deferral.routing.policies import Clusters, Factors, Heads, Linear, Neighbours, Rejector, expert_means
from deferral.routing.prices import fit_prices
from deferral.routing.router import Router
from deferral.routing.training import error_range

RESULTS = Path(__file__).parent / "results"
FOLDS, SEED, RESAMPLES = 5, 0, 1000
POLICIES = (Linear, Neighbours, Clusters, Heads, Factors)
LEARNERS = ("linear", "neighbours", "clusters", "heads", "factors", "rejector linear", "rejector", "learned", "routed")
PEERS = {
    "routellm": "measured with MiniLM vectors: logistic on 'small is right' .587, matrix factorisation .601, kNN .666, MLP .668, "
    "true subject .674, blend by hand .682",
    "routellm-1500": "RouteLLM's published best .603; with MiniLM vectors: MLP .647, blend .640",
    "routellm-subjects": "with MiniLM vectors: as RouteLLM .497, length .583, kNN .597, blend .607",
    "llmrouter": "with MiniLM vectors: saving of comp-sum fitted per trade-off 53%, kNN shrunk 64%, 64 clusters 66%; AIQ .632, "
    "static mix .586",
    "llmrouter-tasks": "with MiniLM vectors: every learned method at most AIQ .576, static mix .586",
    "mmlu-pro": "with MiniLM vectors and other prices: static mix .668, kNN shrunk .681",
    "mmlu-pro-categories": "with MiniLM vectors and other prices: kNN shrunk .664, static mix .668",
    "routerdc": "best single 54.56, fine-tuned encoder 58.54, 16 clusters 58.6 (chosen on test), best model per true task 58.67",
    "routerbench": "",
}


@dataclass(frozen=True)
class Data:
    """Outcomes of E experts on N queries."""

    queries: list[str]
    experts: list[str]
    quality: np.ndarray
    price: np.ndarray
    subject: np.ndarray

    def table(self, rows: np.ndarray) -> Table:
        shape = (len(rows), len(self.experts))
        unknown = np.full(shape, np.nan, np.float32)
        quality = self.quality[rows].astype(np.float32)
        return Table(
            [self.queries[row] for row in rows], self.experts, quality, self.price[rows], np.ones(shape, bool), unknown, unknown
        )


def lines_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def routellm(folder: Path) -> Data:
    rows = lines_of(folder / "routellm_mmlu.jsonl.gz")
    quality = np.array([[row["mixtral_8x7b"], row["gpt4"]] for row in rows], float)
    # One call to the strong model is the unit of price: APGR counts calls.
    price = np.tile([[0.0, 1.0]], (len(rows), 1))
    return Data([r["prompt"] for r in rows], ["mixtral_8x7b", "gpt4"], quality, price, np.array([r["subject"] for r in rows]))


def llmrouter(folder: Path) -> Data:
    rows = lines_of(folder / "llmrouter_9model_train_prompts.jsonl.gz")
    with np.load(folder / "llmrouter_9model_train_outcomes.npz") as stored:
        characters = np.array([[len(row["prompt"])] for row in rows])
        price = (characters / 4 * stored["usd_per_million_in"] + 150 * stored["usd_per_million_out"]) / 1e6
        quality, names = stored["score"].astype(float), stored["models"].tolist()
    return Data([row["prompt"] for row in rows], names, quality, price, np.array([row["task"] for row in rows]))


# Dollars per million tokens in and out, by the size of the model.
_SMALL, _MIDDLE, _LARGE, _LARGEST = (0.2, 0.2), (0.6, 0.6), (0.88, 0.88), (2.0, 6.0)
_PRICES = {
    "gemini-1.5-flash-002": (0.1, 0.4), "gemini-1.5-pro-002": (1.25, 10.0), "jamba-1.5-large": _LARGEST,
    "Qwen1.5-110B": (1.2, 1.2), "Yi-34B": _MIDDLE, "c4ai-command-r-v01": _MIDDLE, "Llama-2-13b-hf": (0.3, 0.3),
    "Phi-3-mini-4k-instruct": (0.1, 0.1),
}  # fmt: skip


def _price_of(name: str) -> tuple[float, float]:
    if name in _PRICES:
        return _PRICES[name]
    if "Mixtral" in name:
        return _MIDDLE
    return _LARGE if "70" in name or "72B" in name else _SMALL


def mmlu_pro(folder: Path) -> Data:
    rows = lines_of(folder / "mmlu_pro_questions.jsonl.gz")
    texts = [f"{r['question']}\n" + "\n".join(f"{chr(65 + i)}. {o}" for i, o in enumerate(r["options"])) for r in rows]
    with np.load(folder / "mmlu_pro_outcomes.npz") as stored:
        kept = [place for place, name in enumerate(stored["models"]) if name != "DeepSeek-Coder-V2"]
        names = stored["models"][kept].tolist()
        whole = (stored["pred"][:, kept] != -2).all(1)
        quality = (stored["pred"][:, kept] == stored["answer"][:, None]).astype(float)[whole]
        output = stored["output_chars"][:, kept].astype(float)[whole] / 4
    queries = [text for text, good in zip(texts, whole, strict=True) if good]
    rates = np.array([_price_of(name) for name in names])
    price = (np.array([[len(text) / 4] for text in queries]) * rates[:, 0] + output * rates[:, 1]) / 1e6
    return Data(queries, names, quality, price, np.array([r["category"] for r, good in zip(rows, whole, strict=True) if good]))


def routerbench(folder: Path) -> Data:
    rows = lines_of(folder / "routerbench_0shot_prompts.jsonl.gz")
    with np.load(folder / "routerbench_0shot_outcomes.npz") as stored:
        quality, price, names = stored["score"].astype(float), stored["cost_usd"].astype(float), stored["models"].tolist()
    return Data([row["prompt"] for row in rows], names, quality, price, np.array([row["task"] for row in rows]))


def random_folds(rows: int) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(rows) % FOLDS


def subject_folds(subject: np.ndarray) -> np.ndarray:
    """Whole subjects, drawn at random, a fifth of them a fold."""
    names = np.unique(subject)
    fold = dict(zip(np.random.default_rng(SEED).permutation(names), np.arange(len(names)) % FOLDS, strict=True))
    return np.array([fold[name] for name in subject])


@dataclass
class Predicted:
    """What the methods say of every row, from folds that did not see it."""

    estimates: dict[str, np.ndarray]  # method: (N, E), of methods that estimate a quality
    actions: dict[str, np.ndarray]  # method: (S, N), of methods that decide at every price of an error
    errors: np.ndarray  # (S,)
    price: np.ndarray  # (N, E), as predicted before the answer
    fallback: np.ndarray  # (S, N) bool
    static: np.ndarray  # (S, N) the single expert of the training folds
    seconds: dict[str, float]


def predicted(data: Data, fold: np.ndarray, *, train_rows: int | None = None) -> Predicted:
    """All methods on all folds."""
    rows, experts = data.quality.shape
    errors = trade_offs(data.price)
    errors[0] = 1e6 * errors[1]
    low, high = error_range(data.price)
    result = Predicted(
        {}, {}, errors, np.empty((rows, experts)), np.zeros((len(errors), rows), bool), np.zeros((len(errors), rows), int), {}
    )
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if train_rows is not None:
            train = np.sort(np.random.default_rng(number).choice(train, train_rows, replace=False))
        table = data.table(train)
        router = Router(1.0, policies=POLICIES[:4], seed=SEED)
        begun = time.perf_counter()
        router.fit(table)
        result.seconds["routed"] = result.seconds.get("routed", 0) + time.perf_counter() - begun
        queries = [data.queries[row] for row in test]
        seen, unseen = router.encoder(table.queries), router.encoder(queries)
        quality, weights = table.quality, np.ones_like(table.quality)
        means = expert_means(quality, weights)
        price = fit_prices(table)(np.array([len(query) for query in queries], float))
        result.price[test] = price

        def put(name: str, values: np.ndarray, test: np.ndarray = test) -> None:
            result.estimates.setdefault(name, np.zeros((rows, experts)))[test] = values

        for make in POLICIES:
            policy = make()
            begun = time.perf_counter()
            put(policy.kind, means + policy.fit(seen, quality, weights, means, seed=SEED).deviations(unseen))
            result.seconds[policy.kind] = result.seconds.get(policy.kind, 0) + time.perf_counter() - begun
        put("length", means + by_length(seen, quality - means, unseen))
        put("true subject", by_subject(data.subject[train], quality, data.subject[test], means))
        put("learned", router.fitted.estimate(unseen)[0])
        order = np.argsort(price.mean(0), kind="stable")
        for name, hidden in (("rejector linear", 0), ("rejector", 64)):
            rejector = Rejector(hidden=hidden).fit(seen, quality, weights, table.price, np.array([low, high]), seed=SEED)
            for place, error in enumerate(errors):
                scores = rejector.scores(unseen, price, float(np.clip(error, low, high)))
                result.actions.setdefault(name, np.zeros((len(errors), rows), int))[place, test] = order[
                    scores[:, order].argmax(1)
                ]
        for place, error in enumerate(errors):
            decisions = router.decide(router.plan(price_of_error=float(error)), unseen, queries)
            result.actions.setdefault("routed", np.zeros((len(errors), rows), int))[place, test] = decisions.actions
            result.fallback[place, test] = decisions.fallback
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


def two_models(data: Data, fold: np.ndarray, found: Predicted) -> Iterator[dict]:
    """APGR and CPT, the mean over the folds."""
    gain = data.quality[:, 1] - data.quality[:, 0]
    scores = {name: estimate[:, 1] - estimate[:, 0] for name, estimate in found.estimates.items()}
    # A method that decides has no score: how cheap an error may be and gpt4 is still asked is one.
    for name, actions in found.actions.items():
        scores[name] = (actions == 1).sum(0).astype(float)
    scores["random"] = np.zeros(len(gain))
    scores["oracle"] = gain

    def figure(name: str) -> Callable[[Tensor], Tensor]:
        def of_weights(weights: Tensor) -> Tensor:
            parts = [apgr(scores[name][fold == n], gain[fold == n], weights[:, fold == n].numpy()) for n in range(FOLDS)]
            return torch.from_numpy(np.mean(parts, axis=0))

        return of_weights

    resampled = {name: bootstrap(figure(name), len(gain), resamples=RESAMPLES, seed=SEED) for name in scores}
    one = torch.ones(1, len(gain), dtype=torch.float64)
    estimates = {name: float(figure(name)(one)) for name in scores}
    for name in ("random", "length", "true subject", *LEARNERS, "oracle"):
        own = interval(estimates[name], resampled[name])
        apart = interval(estimates[name] - estimates["neighbours"], resampled[name] - resampled["neighbours"])
        calls = [np.mean([cpt(scores[name][fold == n], gain[fold == n], share) for n in range(FOLDS)]) for share in (0.5, 0.8)]
        yield {
            "method": name,
            "APGR": own.estimate,
            "APGR_interval": [own.low, own.high],
            "over_neighbours": apart.estimate,
            "over_neighbours_interval": [apart.low, apart.high],
            "CPT50": float(calls[0]),
            "CPT80": float(calls[1]),
            "APGR_pooled": float(apgr(scores[name], gain)),
            "APGR_fold_0": float(apgr(scores[name][fold == 0], gain[fold == 0])),
        }


def priced(data: Data, fold: np.ndarray, found: Predicted) -> Iterator[dict]:
    """AIQ and saving of the pooled curves."""
    rows = np.arange(len(data.quality))
    curves = {name: curve_of(estimate, found.price, data, found.errors) for name, estimate in found.estimates.items()}
    for name, actions in {**found.actions, "static mix of the training folds": found.static}.items():
        curves[name] = Curve(data.price[rows, actions], data.quality[rows, actions])
    curves["static mix"] = static_curve(data.price, data.quality)
    oracle = curve(data.quality, data.price, data.quality, found.errors)
    curves["oracle"] = oracle
    best = best_expert(data.quality, data.price)

    def figures(name: str) -> Callable[[Tensor], Tensor]:
        def of_weights(weights: Tensor) -> Tensor:
            points = curves[name].points(weights.numpy())
            total = weights.sum(-1, keepdim=True)
            prices, qualities = (weights @ data.price / total).numpy(), (weights @ data.quality / total).numpy()
            return torch.tensor(
                [
                    [aiq(one, price.min(), price.max()), *(saving(one, quality[best], price[best], share) for share in SHARES)]
                    for one, price, quality in zip(points, prices, qualities, strict=True)
                ],
                dtype=torch.float64,
            )

        return of_weights

    resampled = {name: bootstrap(figures(name), len(rows), resamples=RESAMPLES, seed=SEED) for name in curves}
    one = torch.ones(1, len(rows), dtype=torch.float64)
    estimates = {name: figures(name)(one)[0].tolist() for name in curves}
    for name in ("static mix", "static mix of the training folds", "length", "true subject", *LEARNERS, "oracle"):
        own = interval(estimates[name][0], resampled[name][:, 0])
        mix = "static mix of the training folds"
        apart = interval(estimates[name][0] - estimates[mix][0], resampled[name][:, 0] - resampled[mix][:, 0])
        saved = [interval(estimates[name][place], resampled[name][:, place]) for place in range(1, 1 + len(SHARES))]
        yield {
            "method": name,
            "AIQ": own.estimate,
            "AIQ_interval": [own.low, own.high],
            "over_static": apart.estimate,
            "over_static_interval": [apart.low, apart.high],
            **{f"saving_{round(100 * share)}": part.estimate for share, part in zip(SHARES, saved, strict=True)},
            "saving_100_interval": [saved[0].low, saved[0].high],
            **(
                {"fallback": float(found.fallback.mean()), "fallback_by_row": float(found.fallback.all(0).mean())}
                if name == "routed"
                else {}
            ),
        }


SHARES = (1.0, 0.98, 0.95)


def curve_of(estimate: np.ndarray, price: np.ndarray, data: Data, errors: np.ndarray) -> Curve:
    """Decisions by the predicted price, judged by the price that was paid."""
    rows, order = np.arange(len(price)), np.argsort(price.mean(0), kind="stable")
    chosen = [order[(estimate[:, order] - price[:, order] / error).argmax(1)] for error in errors]
    return Curve(np.stack([data.price[rows, one] for one in chosen]), np.stack([data.quality[rows, one] for one in chosen]))


def routerdc(folder: Path) -> Iterator[dict]:
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
    encoder = NgramEncoder(seed=SEED)
    seen, unseen = encoder.fit(table.queries), encoder([queries[row] for row in test])
    ones = np.ones_like(table.quality)
    means = expert_means(table.quality, ones)
    chosen: dict[str, np.ndarray] = {"best single of train": np.full(len(test), means.argmax())}
    for make in POLICIES:
        policy = make().fit(seen, table.quality, ones, means, seed=SEED)
        chosen[policy.kind] = (means + policy.deviations(unseen)).argmax(1)
    router = Router(1.0, policies=POLICIES[:4], seed=SEED).fit(table)
    decisions = router.route_batch([queries[row] for row in test])
    chosen["routed"], chosen["learned"] = (
        decisions.actions,
        router.fitted.estimate(router.encoder([queries[r] for r in test]))[0].argmax(1),
    )
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

        found = interval(float(cells @ got), bootstrap(mean, len(test), resamples=RESAMPLES, seed=SEED))
        by_task = {n: float(got[torch.from_numpy(task == n)].mean()) for n in np.unique(task)}
        yield {"method": name, "score": found.estimate, "score_interval": [found.low, found.high], **by_task}
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
}


def run(name: str, folder: Path) -> tuple[list[dict], dict[str, float]]:
    """The lines of a table, and the seconds that fitting took."""
    if name == "routerdc":
        return list(routerdc(folder)), {}
    read, fold_of, judge, train_rows = TABLES[name]
    data = read(folder)
    fold = random_folds(len(data.queries)) if fold_of is random_folds else subject_folds(data.subject)
    found = predicted(data, fold, train_rows=train_rows)
    return list(judge(data, fold, found)), found.seconds


def show(name: str, lines: list[dict]) -> None:
    keys = [key for key in lines[0] if not key.endswith("_interval")]
    keys += [key for line in lines for key in line if key not in keys and not key.endswith("_interval")]
    table = Printed(title=name, box=None, header_style="bold", title_justify="left")
    for key in dict.fromkeys(keys):
        table.add_column(key.replace("_", " "), justify="left" if key == "method" else "right", no_wrap=True)
    for line in lines:
        cells = []
        for key in dict.fromkeys(keys):
            value, ends = line.get(key, ""), line.get(f"{key}_interval")
            text = value if isinstance(value, str) else f"{value:.4f}"
            cells.append(f"{text} [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else text)
        table.add_row(*cells)
    Console(width=220).print(table)
    if PEERS[name]:
        Console(width=220).print(f"peers: {PEERS[name]}\n", highlight=False)


@click.command()
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), envvar="DEFERRAL_DATA", help="Folder of the data.")
@click.option("--only", multiple=True, type=click.Choice([*TABLES, "routerdc"]), help="Some of the tables.  [default: all]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder of the results.")
def command(root: Path | None, only: tuple[str, ...], out: Path) -> None:
    """Routers on real outcomes, beside peers' figures."""
    if root is None:
        raise click.UsageError("name the folder of the data with --root, or set DEFERRAL_DATA")
    torch.set_num_threads(1)
    for name in only or (*TABLES, "routerdc"):
        begun = time.perf_counter()
        lines, seconds = run(name, root / "llm")
        show(name, lines)
        record = {
            "command": f"python -m benchmarks routing --only {name}",
            "device": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "numpy", "scipy", "scikit-learn")},
            "seed": SEED,
            "folds": FOLDS,
            "resamples": RESAMPLES,
            "wall_seconds": round(time.perf_counter() - begun, 1),
            "fit_seconds": {method: round(value, 1) for method, value in seconds.items()},
            "peers": PEERS[name],
            "lines": lines,
        }
        path = out / f"routing-{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        click.echo(f"wrote {path.name}")


def main(arguments: list[str]) -> None:
    """Run from `python -m benchmarks`."""
    command.main(arguments, prog_name="python -m benchmarks routing")
