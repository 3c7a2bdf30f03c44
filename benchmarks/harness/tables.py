"""Markdown tables from the records of finished cells: seeds are summarised, cells that are missing say so."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deferral.intervals import over_seeds

__all__ = ["Section", "by_method", "by_point", "claims", "matrix", "verdicts"]

Record = Mapping[str, Any]
NOT_RUN = "not run"


@dataclass(frozen=True)
class Section:
    """One table of the page: its cells, by data and cost, and how they are shown."""

    title: str
    about: str  # claim and protocol, from the script's docstring
    commands: Sequence[str]
    table: str
    methods: Sequence[str]
    entries: Mapping[str, Sequence[tuple[str, str]]]  # preset: (data, cost) of every table
    seeds: int
    layout: str = "by_method"
    scale: float = 100.0
    unit: str = "%"
    published: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    published_as: str = "published"  # the heading of those figures
    alone: float | None = None  # the accuracy in % of the other classifier that they are of: then ours are not compared with them
    claims: Mapping[str, Sequence[str]] = field(default_factory=dict)  # method: those that it is claimed to be cheaper than
    stars: Sequence[Sequence[str]] = ()  # in a matrix: * where cheaper than all of the first references, ** than the second's
    unlike: Mapping[str, Sequence[str]] = field(default_factory=dict)  # method: references that it is not counted against
    without: Callable[[str, str], bool] = lambda data, method: False  # methods that a data set does not have

    def methods_of(self, data: str) -> list[str]:
        """The rows of a data set's table."""
        return [method for method in self.methods if not self.without(data, method)]

    def shows(self, record: Record) -> bool:
        """True if the cell has a place on the page."""
        cell = record["cell"]
        entry = (cell["data"], cell["cost"])
        return entry in self.entries.get(cell["preset"], ()) and cell["method"] in self.methods_of(cell["data"])


def chosen(records: Iterable[Record], preset: str, data: str, cost: str, method: str) -> list[Record]:
    """The cells of one row, by seed."""
    wanted = {"preset": preset, "data": data, "cost": cost, "method": method}
    found = [record for record in records if all(record["cell"][key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda record: record["cell"]["seed"])


def by_method(section: Section, records: Sequence[Record], preset: str, data: str, cost: str) -> list[str]:
    """A row for each method: its cost with and without the fitted threshold, what it keeps, how it compares."""
    methods = section.methods_of(data)
    published = {m: section.published[data, cost, m] for m in methods if (data, cost, m) in section.published}
    if not any(chosen(records, preset, data, cost, method) for method in methods):
        figures = "; ".join(f"{method} {figure}" for method, figure in published.items())
        return [f"Not run.  {section.published_as.capitalize()}, {section.unit}: {figures}." if published else "Not run."]
    references = _references(section, records)
    head = ["method", "seeds", f"cost, {section.unit}", "natural threshold", "kept, %", f"cost of what is kept, {section.unit}"]
    head += [f"minus {name}" for name in references]
    compared = published and section.alone is None
    head += [section.published_as] if published else []
    head += [f"ours minus {section.published_as}"] if compared else []
    lines = _header(head)
    if published and not compared:
        lines = [_not_comparable(section, chosen(records, preset, data, cost, methods[0])), "", *lines]
    for method in methods:
        cells = chosen(records, preset, data, cost, method)
        row = [method, _seeds(section, cells), *(_over(cells, key, scale) for key, scale in _columns(section))]
        row += [_difference(cells, name, section.scale) for name in references]
        row += [published.get(method, "not available to us")] if published else []
        row += [_against(cells, published.get(method), section.scale, preset)] if compared else []
        lines.append(_line(row))
    return lines


def by_point(section: Section, records: Sequence[Record], preset: str, data: str, cost: str) -> list[str]:
    """A row for each method, a column for each point of its curve."""
    rows = {method: chosen(records, preset, data, cost, method) for method in section.methods_of(data)}
    if not any(rows.values()):
        return ["Not run."]
    points = next((_points(cells[0]) for cells in rows.values() if cells), [])
    lines = _header([f"cost, {section.unit}", "seeds", *points])
    for method, cells in rows.items():
        figures = [_over(cells, "cost", section.scale, part=number) for number in range(len(points))]
        lines.append(_line([method, _seeds(section, cells), *figures]))
    return lines


def matrix(section: Section, records: Sequence[Record], preset: str, cost: str) -> list[str]:
    """A row for each data set, a column for each method; what the stars mean stands above the table."""
    data_sets = [data for data, at in section.entries[preset] if at == cost]
    methods = [m for m in section.methods if any(chosen(records, preset, data, cost, m) for data in data_sets)]
    if not methods:
        return ["Not run."]
    lines, stars = _header(["cost", *methods]), {method: Counter[str]() for method in methods}
    for data in data_sets:
        figures = []
        for method in methods:
            cells = chosen(records, preset, data, cost, method)
            unlike = set(section.unlike.get(method, ()))
            star = "".join(
                "*"
                for names in section.stars
                if cells and not unlike.intersection(names) and all(_cheaper(cells[0], name) for name in names)
            )
            stars[method][star] += 1
            figures.append(f"{_over(cells, 'cost', section.scale)} {star}".strip())
        lines.append(_line([data, *figures]))
    lines.append(
        _line(["sets with * or **, with **", *(f"{found['*'] + found['**']}, {found['**']}" for found in stars.values())])
    )
    return lines


def verdicts(section: Section, records: Sequence[Record], preset: str) -> list[str]:
    """How often each method is cheaper, undecided and dearer than each reference: over data, costs, seeds and points."""
    references = _references(section, [record for record in records if record["cell"]["preset"] == preset])
    lines = _header(["cheaper / undecided / dearer than", *references])
    for method in section.methods:
        mine = [r for r in records if r["cell"]["preset"] == preset and r["cell"]["method"] == method]
        if not mine:
            continue
        row = [method]
        for name in references:
            counted = name not in section.unlike.get(method, ())
            parts = [part for record in mine for part in record["parts"] if counted and name in part["difference"]]
            found = [part["difference"][name] for part in parts]
            lower, higher = sum(d["high"] < 0 for d in found), sum(d["low"] > 0 for d in found)
            row.append(f"{lower} / {len(found) - lower - higher} / {higher}" if found else "")
        lines.append(_line(row))
    return lines if len(lines) > 2 else []


def claims(section: Section, records: Sequence[Record], preset: str) -> list[str]:
    """What is claimed, beside what was found: the difference over the seeds, which share their rows, at either threshold."""
    lines = _header(["claimed to be cheaper", "than", "at", "natural threshold", "fitted threshold"])
    for method, rivals in section.claims.items():
        for rival in rivals:
            for data, cost in section.entries[preset]:
                mine, theirs = (
                    {c["cell"]["seed"]: c for c in chosen(records, preset, data, cost, name)} for name in (method, rival)
                )
                pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
                if pairs:
                    found = [_claimed(pairs, key, section.scale) for key in ("natural_cost", "cost")]
                    lines.append(_line([method, rival, f"{data}, {cost}", *found]))
    return lines if len(lines) > 2 else []


def _claimed(pairs: Sequence[tuple[Record, Record]], key: str, scale: float) -> str:
    """The mean difference of the last point, Student's interval over the seeds, and what that says of the claim."""
    values = [scale * (mine["parts"][-1][key]["estimate"] - theirs["parts"][-1][key]["estimate"]) for mine, theirs in pairs]
    figures, digits = over_seeds(torch.tensor(values, dtype=torch.float64)), _digits(scale)
    if len(values) == 1:
        return f"{_rounded(figures.mean):+.{digits}f} (one seed)"
    verdict = "cheaper" if figures.high < 0 else "dearer" if figures.low > 0 else "undecided"
    return f"{_with_interval(figures.mean, figures.low, figures.high, digits)}, {verdict}"


def _columns(section: Section) -> list[tuple[str, float]]:
    return [("cost", section.scale), ("natural_cost", section.scale), ("coverage", 100.0), ("accepted_cost", section.scale)]


def _references(section: Section, records: Sequence[Record]) -> list[str]:
    known = {name for record in records for part in record["parts"] for name in part["difference"]}
    return [method for method in section.methods if method in known]


def _over(cells: Sequence[Record], key: str, scale: float, *, part: int = 0) -> str:
    """Mean +- deviation over the seeds; for one seed, half its bootstrap interval."""
    if not cells:
        return NOT_RUN
    values = [cell["parts"][part][key] for cell in cells if key in cell["parts"][part]]
    if not values:
        kept = any(cell["parts"][part]["coverage"]["estimate"] > 0 for cell in cells)
        return "too few kept" if kept else "none kept"
    figures = over_seeds(torch.tensor([scale * value["estimate"] for value in values], dtype=torch.float64))
    spread = figures.deviation if len(values) > 1 else scale * (values[0]["high"] - values[0]["low"]) / 2
    # Where a seed keeps too little, the cost of what is kept has no interval.
    some = "" if len(values) == len(cells) else f" ({len(values)} of {len(cells)})"
    return f"{_rounded(figures.mean):.{_digits(scale)}f} ± {_rounded(spread):.{_digits(scale)}f}{some}"


def _seeds(section: Section, cells: Sequence[Record]) -> str:
    return str(len(cells)) if len(cells) == section.seeds else f"{len(cells)} of {section.seeds}"


def _difference(cells: Sequence[Record], name: str, scale: float) -> str:
    """The mean difference over seeds, with the range that covers every seed's 95% interval."""
    found = [cell["parts"][0]["difference"][name] for cell in cells if name in cell["parts"][0]["difference"]]
    if not found:
        return NOT_RUN if not cells else ""
    mean = sum(d["estimate"] for d in found) / len(found)
    low, high = min(d["low"] for d in found), max(d["high"] for d in found)
    return _with_interval(scale * mean, scale * low, scale * high, _digits(scale))


def _not_comparable(section: Section, own: Sequence[Record]) -> str:
    """What stands above figures of another classifier; `own` are the cells of ours alone."""
    errors = [cell["parts"][0]["cost"]["estimate"] for cell in own]
    ours = f"ours on {100 - 100 * sum(errors) / len(errors):.1f}%" if errors else "ours was not run"
    return f"Not comparable with the {section.published_as}: alone that one is right on {section.alone:.1f}% of the rows, {ours}."


def _against(cells: Sequence[Record], published: str | None, scale: float, preset: str) -> str:
    """Ours minus the published mean, with an interval; the published protocol gets a verdict.

    The interval is the wider at each end of Student's over our seeds and the mean of the seeds' intervals over the test rows,
    which all seeds share in part; the noise of the published figure is not in it.
    """
    if published is None:
        return ""
    if not cells:
        return NOT_RUN
    target = float(published.split()[0])
    values = [scale * cell["parts"][0]["natural_cost"]["estimate"] - target for cell in cells]
    figures = over_seeds(torch.tensor(values, dtype=torch.float64))
    over_rows = [[scale * cell["parts"][0]["natural_cost"][end] - target for cell in cells] for end in ("low", "high")]
    low, high = (sum(ends) / len(ends) for ends in over_rows)
    if len(cells) > 1:
        low, high = min(low, figures.low), max(high, figures.high)
    verdict = "" if preset != "paper" else ", above" if low > 0 else ", below" if high < 0 else ", agrees"
    return f"{_with_interval(figures.mean, low, high, 2)}{verdict}{' (one seed)' if len(cells) == 1 else ''}"


def _cheaper(cell: Record, name: str) -> bool:
    difference = cell["parts"][0]["difference"].get(name)
    return difference is not None and difference["high"] < 0


def _points(cell: Record) -> list[str]:
    return [", ".join(f"{name}: {value:g}" for name, value in part["at"].items()) for part in cell["parts"]]


def _with_interval(estimate: float, low: float, high: float, digits: int) -> str:
    estimate, low, high = (_rounded(value) for value in (estimate, low, high))
    return f"{estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _rounded(value: float) -> float:
    # Half of the last digit must not go up with one version of torch, and down with another.
    return round(value, 9)


def _digits(scale: float) -> int:
    return 2 if scale == 100 else 4


def _header(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "|".join(["---"] * len(names)) + "|"]


def _line(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"
