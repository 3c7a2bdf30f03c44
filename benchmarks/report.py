"""Writes docs/reproduction.md and its pictures from all cells found.  python -m benchmarks report"""

import inspect
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

from benchmarks import multi_expert, people, predictor_rejector, realizable, regression, score_based, two_stage
from benchmarks.harness import abstention, simulated
from benchmarks.harness.cells import Results
from benchmarks.harness.judging import RESAMPLES
from benchmarks.harness.presets import PRESETS
from benchmarks.harness.running import RESULTS
from benchmarks.harness.settings import PRECISION, way_of
from benchmarks.harness.tables import Record, Section, by_method, by_point, chosen, claims, matrix, verdicts
from deferral.datasets import DataError
from deferral.plots.style import style

_BASELINES = 3  # the first methods of a section
IMAGE_PRESETS = ("laptop", "fast", "paper")
PAGE = Path(__file__).parent.parent / "docs" / "reproduction.md"
INTRODUCTION = """\
# The experiments of the thesis, repeated

Written by `python -m benchmarks report` from the cells in `{folder}`; every cell names its settings, its commit and
the versions of Python, torch and NumPy.  Those of scikit-learn and SciPy, on which regression and the tweets depend, are unknown
where a cell does not name them.  Published figures stand beside ours where they are known to us.

| section | published figures known to us | run here | as published |
|---|---|---|---|
{overview}

So the claims of the papers are put to the test here on other problems than theirs, and whether they hold there is said under each
heading; only the preset `paper` would repeat a published number.

How to read the tables.  A cost is the mean over the test rows, in errors; with several seeds it is the mean ± the deviation
over seeds, with one seed ± half of its 95% bootstrap interval.  Thresholds are fitted on calibration rows for every method,
baselines included; "natural threshold" is the same scores without that, which is the rule of the theory.  A difference is
paired over the test rows, its brackets cover every seed's 95% interval.  "Cheaper" and "dearer" count the intervals that lie
on one side of zero; of a claim, the interval is Student's over the seeds (of a curve, at its last point).  "Ours minus
published" is at the natural threshold and has a 95% interval, over our seeds or over the test rows, whichever is the wider;
in the published protocol (preset paper) ours agrees where that holds 0, and else is below or above.  Costs of what is kept
are over the seeds that keep enough for an interval, which is something in each of {resamples} resamples of the test rows.
Minutes are sums over the cells, where other work on the machine makes them more; started twice, a command shares its cells
between two processes, a core each, and takes half as long.  A command whose cells are all there computes nothing: `--out DIR`
makes them again.
"""
# Of each table: its name, the published figures that are known to us, and whether what is run here is the published experiment.
OVERVIEW = {
    abstention.TABLE: ("abstention on images", "yes", "no: `paper` is nearest to it"),
    simulated.TABLE: ("several experts on images", "no", "not known: experts, networks and costs are ours"),
    people.TABLE: (
        "people",
        "bars of another classifier, not comparable",
        "the split of CIFAR-10H, with a smaller network; else designs of ours",
    ),
    regression.TABLE: ("regression", "no", "not known: experts, costs and splits are ours"),
    realizable.TABLE: ("realizable problems", "a picture", "the synthetic problem of one expert; the router's problem is ours"),
}


def _abstention_entries() -> dict[str, list[tuple[str, str]]]:
    return {
        name: [(data, f"c={cost:g}") for data, costs in PRESETS[name].costs.items() for cost in costs] for name in IMAGE_PRESETS
    }


def _claim(*scripts: ModuleType) -> str:
    """The docstrings without their first lines, which name the commands."""
    return "\n\n".join((inspect.getdoc(script) or "").partition("\n\n")[2] for script in scripts)


SIMULATED = [("cifar10", f"{kind}, price {price:g}") for price in simulated.PRICES for kind in simulated.KINDS]
PEOPLE = [(data, f"price {price:g}") for data in people.PROBLEMS for price in people.PRICES]
SECTIONS = (
    Section(
        title="Abstention on images",
        about=_claim(score_based, predictor_rejector),
        commands=("score-based", "predictor-rejector"),
        table=abstention.TABLE,
        methods=tuple(dict.fromkeys((*score_based.METHODS[:4], *predictor_rejector.METHODS))),
        entries=_abstention_entries(),
        seeds=3,
        published=predictor_rejector.PUBLISHED,
        claims={
            "two-stage score-based": ("Mozannar-Sontag (mu=1)", "Cao et al. (mu=1.7)"),
            "two-stage predictor-rejector": (
                "Mozannar-Sontag (mu=1)",
                "Cao et al. (mu=1.7)",
                "single-stage predictor-rejector (mae)",
            ),
        },
    ),
    Section(
        title="Deferral to several experts on images",
        about=_claim(multi_expert, two_stage),
        commands=("multi-expert", "two-stage"),
        table=simulated.TABLE,
        methods=tuple(dict.fromkeys((*multi_expert.METHODS, *two_stage.METHODS))),
        entries=dict.fromkeys(IMAGE_PRESETS, SIMULATED),
        seeds=3,
        layout="by_point",
    ),
    Section(
        title="Deferral to people",
        about=_claim(people),
        commands=("people",),
        table=people.TABLE,
        methods=(*people.BASELINES, *people.LEARNED),
        entries=dict.fromkeys(IMAGE_PRESETS, PEOPLE),
        seeds=3,
        published=people.PUBLISHED,
        published_as="bar of another classifier",
        alone=people.ALONE,
        without=lambda data, method: data in people.SEVERAL and method in people.ONE_EXPERT,
    ),
    Section(
        title="Regression",
        about=_claim(regression),
        commands=("regression",),
        table=regression.TABLE,
        methods=regression.METHODS,
        entries={"laptop": [(data, costs) for costs in regression.COSTS for data in regression.DATA]},
        seeds=1,
        layout="matrix",
        scale=1.0,
        stars=((regression.NEVER, regression.ALWAYS), (regression.NEVER, regression.ALWAYS, regression.LONGER)),
        # It takes the first predictor's answers, and so is no bound of one that learned on.
        unlike={regression.ORACLE: (regression.LONGER,)},
    ),
    Section(
        title="Realizable problems",
        about=_claim(realizable),
        commands=("realizable",),
        table=realizable.TABLE,
        methods=tuple(dict.fromkeys(method for methods in realizable.METHODS.values() for method in methods)),
        entries={"laptop": [(problem, "error") for problem in realizable.METHODS]},
        seeds=5,
        layout="by_point",
        without=lambda data, method: method not in realizable.METHODS[data],
        claims={
            **dict.fromkeys(
                ("realizable q=0.7", "realizable q=1"),
                ("single-stage mu=1 (Mozannar-Sontag)", "one-vs-all", "asymmetric softmax"),
            ),
            "realizable router": ("two-stage mu=1",),
        },
    ),
)


def page(results: Results) -> str:
    """The whole page.  Raises DataError where there is no cell to show."""
    records = {section.table: results.read_all(section.table) for section in SECTIONS}
    if not any(records.values()):
        raise DataError(f"{results.folder}: expected cells, found none; name the folder that was the --out of a script")
    overview = []
    for table, (name, known, as_published) in OVERVIEW.items():
        shown = next(section.entries for section in SECTIONS if section.table == table)
        counts = Counter(record["cell"]["preset"] for record in records[table])
        presets = ", ".join(
            f"`{preset}` ({count} cells{'' if preset in shown else ', not shown: it proves nothing'})"
            for preset, count in counts.most_common()
        )
        overview.append(f"| {name} | {known} | {presets or 'not run'} | {as_published} |")
    folder = "benchmarks/results" if results.folder == RESULTS else results.folder
    introduction = INTRODUCTION.format(folder=folder, overview="\n".join(overview), resamples=f"{RESAMPLES:,}")
    return "\n".join([introduction, *(line for section in SECTIONS for line in _section(section, records[section.table]))])


def pictures(results: Results, folder: Path) -> list[Path]:
    """Cost over the number of experts, and over the number of training rows, for the tables that are curves."""
    from matplotlib.figure import Figure

    paths = []
    for section in SECTIONS:
        records = [r for r in results.read_all(section.table) if r["cell"]["preset"] == "laptop" and section.shows(r)]
        if section.layout != "by_point" or not records:
            continue
        entries = [entry for entry in section.entries["laptop"] if any(_of(r) == entry for r in records)]
        rows = -(-len(entries) // 2)
        figure = Figure(figsize=(12, 3.4 * rows + 1.2), layout="constrained")
        named: dict[str, Any] = {}
        for number, (data, cost) in enumerate(entries):
            named |= _draw(figure.add_subplot(rows, min(2, len(entries)), number + 1), section, records, data, cost)
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
        path = folder / f"reproduction-{section.table}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths


@click.command()
@click.option(
    "--out",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=RESULTS,
    help="Folder of the cells; unless it is that of the repository, the page goes into it.  [default: benchmarks/results]",
)
def command(out: Path) -> None:
    """The page and its pictures."""
    committed = out.resolve() == RESULTS.resolve()
    results, path = (Results(RESULTS), PAGE) if committed else (Results(out), out / PAGE.name)
    try:
        text, paths = page(results), pictures(results, path.parent)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    path.write_text(text, encoding="utf-8")
    click.echo("\n".join(f"wrote {written}" for written in [path, *paths]))


def _section(section: Section, records: Sequence[Record]) -> list[str]:
    lines = [f"## {section.title}", "", "```text", section.about.strip(), "```", ""]
    left_out = Counter("`{preset}` on {data}".format(**record["cell"]) for record in records if not section.shows(record))
    if left_out:
        what = "; ".join(f"{count} cells of {what}" for what, count in left_out.items())
        lines += [f"Left out here, since this page has no place for them: {what}.", ""]
    records = [record for record in records if section.shows(record)]
    for preset, entries in section.entries.items():
        mine = [record for record in records if record["cell"]["preset"] == preset]
        where = "" if preset == "laptop" else " --device cuda"
        commands = " and ".join(f"`python -m benchmarks {name} --preset {preset}{where}`" for name in section.commands)
        lines += [f"### {section.title}: {preset}", "", f"{commands}.  {_provenance(mine)}", ""]
        if not mine and (not section.published or section.alone is not None):
            continue
        for summary in (claims(section, mine, preset), verdicts(section, mine, preset)):
            lines += [*summary, ""] if summary else []
        if section.layout == "matrix":
            first, second = section.stars
            lines += [f"\\* cheaper, by its 95% intervals, than {' and '.join(first)}; \\*\\* than {second[-1]} as well.", ""]
            for cost in dict.fromkeys(cost for _, cost in entries):
                lines += [f"**{cost}**", "", *matrix(section, mine, preset, cost), ""]
            continue
        if section.layout == "by_point" and preset == "laptop":
            lines += [f"![cost over {section.table}](reproduction-{section.table}.png)", ""]
        show = by_point if section.layout == "by_point" else by_method
        for data, cost in entries:
            lines += [f"**{data}, {cost}**", "", *show(section, mine, preset, data, cost), ""]
    return lines


def _provenance(records: Sequence[Record]) -> str:
    if not records:
        return "Not run."
    # On a machine that does other things besides, a cell waits: its CPU time is what it takes.
    measure = "CPU time" if all("cpu_seconds" in record for record in records) else "one process"
    minutes = sum(record["cpu_seconds" if measure == "CPU time" else "wall_seconds"] for record in records) / 60
    machines = sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}" for r in records})
    unclean = sum("with changes" in record["machine"]["commit"] for record in records)
    mixed = _mixed(records)
    warning = f"  Cells of several settings stand together ({', '.join(mixed)}): delete the outdated ones." if mixed else ""
    warning += f"  {unclean} cells were made by code that no commit holds." if unclean else ""
    half = sum(record["machine"].get("bfloat16", False) for record in records)
    precision = {0: "float32", len(records): "bfloat16"}.get(half, f"{half} of the cells in bfloat16, the others in float32")
    return f"{len(records)} cells, {minutes:.1f} minutes of {measure}; {'; '.join(machines)}; {precision}.{warning}"


def _mixed(records: Sequence[Record]) -> list[str]:
    """The data sets whose cells were trained in more than one way: a preset may change between two runs."""
    found: dict[str, set[str]] = {}
    for record in records:
        way = {name: value for name, value in way_of(record["settings"]).items() if name not in PRECISION}
        found.setdefault(record["cell"]["data"], set()).add(json.dumps(way, sort_keys=True))
    return sorted(data for data, ways in found.items() if len(ways) > 1)


def _of(record: Record) -> tuple[str, str]:
    return record["cell"]["data"], record["cell"]["cost"]


def _draw(axes: Any, section: Section, records: Sequence[Record], data: str, cost: str) -> dict[str, Any]:
    """One panel.  -> the line of each method"""
    lines, highest = {}, 0.0
    for number, method in enumerate(section.methods):
        cells = chosen(records, "laptop", data, cost, method)
        if not cells:
            continue
        (what, _), *_ = cells[0]["parts"][0]["at"].items()
        points = torch.tensor([part["at"][what] for part in cells[0]["parts"]])
        costs = section.scale * torch.tensor([[part["cost"]["estimate"] for part in cell["parts"]] for cell in cells])
        means, deviation = costs.mean(dim=0), costs.std(dim=0, correction=1 if len(cells) > 1 else 0)
        baseline = number < _BASELINES
        # What is drawn at one place is moved apart a little, so that every deviation is seen; baselines are dashed.
        apart = points * 1.012 ** (number - len(section.methods) / 2)
        shown = style(number) | ({"linestyle": "--"} if baseline else {})
        lines[method] = axes.errorbar(apart, means, deviation, markersize=4, linewidth=1, elinewidth=0.8, **shown)
        if not baseline:
            highest = max(highest, float((means + deviation).max()))
    axes.set_xscale("log")
    axes.set_xticks(points, [f"{point:g}" for point in points])
    axes.minorticks_off()
    axes.set_xlabel(what)
    # A baseline may cost several times as much as all that is learned.
    low, high = axes.get_ylim()
    cut = high > 1.3 * highest
    axes.set_ylim(low, 1.15 * highest if cut else high)
    axes.set_ylabel(f"cost, {section.unit}, ± deviation over seeds", fontsize="small")
    axes.set_title(f"{data}: {cost}{' (baselines above are cut off)' if cut else ''}", fontsize="small", loc="left")
    return lines
