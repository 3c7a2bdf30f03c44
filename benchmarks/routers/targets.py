"""The figures that the router was to reach, beside those of `benchmarks/results/routing-*.json`."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table as Printed

# table, line, figure, target, stretch
TARGETS = (
    ("routellm", "routed", "APGR", 0.66, 0.70),
    ("routellm", "routed", "over_neighbours", 0.0, None),
    ("routellm-1500", "routed", "APGR", 0.64, 0.66),
    ("routellm-subjects", "routed", "APGR", 0.60, 0.62),
    ("llmrouter", "routed", "saving_100", 0.64, 0.68),
    ("llmrouter", "routed", "AIQ", None, 0.64),
    ("llmrouter-tasks", "routed", "over_static", 0.0, None),
    ("llmrouter-tasks", "routed", "over_static lower end", -0.005, None),
    ("mmlu-pro", "routed", "AIQ", 0.69, None),
    ("mmlu-pro-categories", "routed", "over_static", 0.0, None),
    ("routerdc", "routed", "score", 0.580, 0.586),
    ("partial-logs", "random", "share_of_full_gain", 0.90, None),
    ("partial-logs", "biased", "over_naive", 0.0, None),
    ("partial-logs", "biased", "over_naive lower end", 0.0, None),
)

DRAWN = ("length", "true subject", "neighbours", "learned", "routed")


def show_targets(folder: Path) -> None:
    """Print every target with what was reached, as far as the table was run; then RouteLLM's subjects on other draws of folds."""
    table = Printed(title="targets", box=None, header_style="bold", title_justify="left")
    for name in ("table", "line", "figure", "target", "stretch", "reached", "95% interval", ""):
        table.add_column(name, no_wrap=True)
    with_sentences = [
        (f"{name}-sentences", *rest) for name, *rest in TARGETS if (folder / f"routing-{name}-sentences.json").is_file()
    ]
    for name, method, figure, target, stretch in (*TARGETS, *with_sentences):
        path = folder / f"routing-{name}.json"
        if not path.is_file():
            table.add_row(name, method, figure, number(target), number(stretch), "not run", "", "")
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        lines = {line["method"]: line for line in record["lines"]}
        key = figure.removesuffix(" lower end")
        value, ends = lines[method][key], lines[method].get(f"{key}_interval")
        judged = ends[0] if figure != key and ends else value
        word = "missed" if judged is None else "stretch" if stretch is not None and judged >= stretch else "met"
        if judged is not None and target is not None and judged < target:
            word = "missed"
        if judged is not None and target is None and judged < stretch:
            word = "missed"
        word += " (see the note in the file)" if "note" in record else ""
        table.add_row(
            name, method, figure, number(target), number(stretch), number(judged),
            f"[{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "", word,
        )  # fmt: skip
    Console(width=160).print(table)
    show_draws(folder)


def show_draws(folder: Path) -> None:
    """RouteLLM with whole subjects held out, on every draw of the folds that was run, and the mean of the draws."""
    for encoder, ending in (("n-grams", ""), ("a sentence encoder", "-sentences")):
        _show_draws(folder, encoder, ending)


def _show_draws(folder: Path, encoder: str, ending: str) -> None:
    found = {}
    for path in folder.glob(f"routing-routellm-subjects*{ending}.json"):
        if not ending and path.stem.endswith("-sentences"):
            continue
        lines = {line["method"]: line["APGR"] for line in json.loads(path.read_text(encoding="utf-8"))["lines"]}
        found[int(path.stem.removeprefix("routing-routellm-subjects").removesuffix(ending).strip("-") or 0)] = lines
    if len(found) < 2:
        return
    table = Printed(
        title=f"subjects held out, {encoder}, APGR by draw of the folds", box=None, header_style="bold", title_justify="left"
    )
    for name in ("method", *(f"draw {draw}" for draw in sorted(found)), "mean"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name in DRAWN:
        values = [found[draw][name] for draw in sorted(found)]
        table.add_row(name, *map(number, values), number(sum(values) / len(values)))
    Console(width=160).print(table)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
