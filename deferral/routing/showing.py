"""What the commands of `deferral route` print and leave behind."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from deferral.printed import print_whole, table_of
from deferral.routing.decisions import Decision
from deferral.strict_json import as_json

if TYPE_CHECKING:
    from deferral.intervals import Interval
    from deferral.routing.judging import Evaluation
    from deferral.routing.replay import Replay

__all__ = ["draw_evaluation", "save_evaluation", "show_bill", "show_evaluation", "show_explanation", "show_replays"]

_COLOURS = {"routed": "C0", "learned, without fallback": "C1", "static mix of the fit": "C7", "static mix of these rows": "k"}

# From so many on, a bootstrap over subjects is nearly as good as it says.
_MANY_GROUPS = 10
_FEW_GROUPS = (
    "Over so few subjects the intervals are too short: in simulations over two of them an interval of 95% held the truth in 60%, "
    "over five in 83%, over ten in 90% of the cases."
)


def show_evaluation(found: "Evaluation") -> None:
    """Figures by policy with intervals, the gain over the static mix, and what always asking one expert gives."""
    columns = list(dict.fromkeys(name for values in found.figures.values() for name in values))
    figures = [name for name in columns if name not in ("quality", "price")]
    over = "" if found.groups is None else f" of {found.groups:,} subjects"
    interval = "95% interval" if found.groups is None else "95% interval over subjects"
    table = table_of(
        f"{found.rows:,} queries{over}, estimate [{interval}]", "policy", *figures, "AIQ over the static mix of the fit"
    )
    for policy, values in found.figures.items():
        if not policy.startswith("always "):
            row = [_figure(found, name, values.get(name)) for name in figures]
            table.add_row(escape(policy), *row, _ends(found.over_static.get(policy)))
    print_whole(table)
    table = table_of("\nalways one expert", "expert", "quality", "dollars a query")
    for policy, values in found.figures.items():
        if policy.startswith("always "):
            name = policy.removeprefix("always ")
            mark = "  (best)" if name == found.best else ""
            table.add_row(escape(name) + mark, _ends(values["quality"]), _ends(values["price"]))
    print_whole(table)
    Console().print(
        f"\nThe static mix decided {100 * found.fallback:.1f}% of the queries, over all trade-offs.  AIQ: mean quality of the "
        "hull over the prices from the cheapest to the dearest expert.  saving: of the price of the best expert, at that share "
        "of its quality." + ("" if found.groups is None or found.groups >= _MANY_GROUPS else f"\n{_FEW_GROUPS}"),
        highlight=False,
        markup=False,
    )


def show_bill(found: "Mapping[str, Mapping[str, Interval]]", error: float) -> None:
    """What each policy costs and is worth at one price of an error."""
    table = table_of(
        f"\nat ${error:g} an error, estimate [95% interval]",
        *("policy", "quality", "dollars per 1,000", "cost, errors a query", "routed less this, errors"),
    )
    for policy, values in found.items():
        less = "" if policy == "routed" else _ends(values["routed less this"])
        table.add_row(escape(policy), *(_ends(values[name]) for name in ("quality", "dollars per 1,000", "cost")), less)
    print_whole(table)


def save_evaluation(found: "Evaluation", path: Path, *, bill: "Mapping[str, Mapping[str, Interval]] | None" = None) -> None:
    """All figures, the points of the curves and the corners of their hulls, as JSON; null for a figure that does not exist."""
    priced = {policy: {name: asdict(one) for name, one in values.items()} for policy, values in (bill or {}).items()}
    content = {
        **{name: value for name, value in asdict(found).items() if name != "curves"},
        "curves": {name: points.tolist() for name, points in found.curves.items()},
        "hulls": {name: points.tolist() for name, points in found.hulls.items()},
        **({"bill": priced} if priced else {}),
    }
    path.write_text(as_json(content), encoding="utf-8")


def draw_evaluation(found: "Evaluation", path: Path) -> bool:
    """The cost-quality curves with their hulls as a picture; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, colour in _COLOURS.items():
        points, corners = 1000 * found.curves[name][:, 0], found.hulls[name]
        axes.scatter(points, found.curves[name][:, 1], s=8, color=colour)
        axes.plot(1000 * corners[:, 0], corners[:, 1], color=colour, label=name)
    for name in found.experts:
        always = found.figures[f"always {name}"]
        place = (1000 * always["price"].estimate, always["quality"].estimate)
        axes.annotate(name, place, textcoords="offset points", xytext=(4, -8), fontsize=7)
    axes.set(xlabel="dollars per 1,000 queries", ylabel="mean quality")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def show_explanation(decision: Decision, nearest: list[tuple[str, float]]) -> None:
    """What is expected of every expert, who is asked and why, and the logged queries that are nearest."""
    table = table_of("", "expert", "expected quality", "dollars", "cost in errors")
    for name in sorted(decision.cost, key=lambda name: decision.cost[name]):
        cost = f"{decision.cost[name]:.3f}" if decision.cost[name] < float("inf") else "may not be asked"
        style = "bold" if name == decision.expert else None
        table.add_row(escape(name), f"{decision.quality[name]:.3f}", f"{decision.price[name]:.3g}", cost, style=style)
    print_whole(table)
    lines = [f"\n{decision.why}", f"propensity {decision.propensity:.3g}, similarity to the log {decision.similarity:.2f}"]
    lines += ["\nnearest logged queries:"] if nearest else []
    lines += [f"  {similarity:.2f}  {' '.join(text.split())[:100] or '(its text is not kept)'}" for text, similarity in nearest]
    Console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def show_replays(logged: "Mapping[str, Interval]", replays: "Mapping[str, Replay]", assumed: float) -> None:
    """The worth of each policy on the log by every method, and how much the log has to say about it."""
    # Imported here: whoever explains a decision must not wait for torch.
    from deferral.routing.replay import METHODS

    table = table_of(
        "cost in errors, estimate [95% interval]",
        *("policy", *METHODS, "quality, doubly robust", "dollars, doubly robust", "effective decisions", "largest weight"),
    )
    table.add_row("as logged", _ends(logged["cost"]), "", "", _ends(logged["quality"]), _ends(logged["price"]), "", "")
    for name, one in replays.items():
        found = [_ends(one.cost[method]) for method in METHODS]
        robust = METHODS[-1]
        size = (f"{one.effective:,.0f}", f"{one.largest_weight:.3g}")
        table.add_row(escape(name), *found, _ends(one.quality[robust]), _ends(one.price[robust]), *size)
    print_whole(table)
    if assumed > 0:
        Console().print(
            f"\n{100 * assumed:.0f}% of the outcomes have no propensity: who was asked there is taken not to have depended on "
            "the query.  Where it did, these figures are off.",
            highlight=False,
            markup=False,
        )


def _figure(found: "Evaluation", name: str, value: "Interval | None") -> str:
    if value is None or not name.startswith("saving") or not math.isnan(value.estimate):
        return _ends(value)
    return "never reached" if found.figures[f"always {found.best}"]["price"].estimate > 0 else "nothing to save"


def _ends(value: "Interval | None") -> str:
    if value is None:
        return ""
    # What differs by rounding alone is no difference.
    estimate, low, high = (round(one, 12) + 0.0 for one in (value.estimate, value.low, value.high))
    return f"{estimate:.4g} [{low:.4g}, {high:.4g}]"
