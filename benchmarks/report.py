"""Writes docs/reproduction.md and its pictures from all cells found.  python -m benchmarks report"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import click

from benchmarks import multi_expert, people, predictor_rejector, realizable, regression, score_based, two_stage
from benchmarks.harness import abstention, simulated
from benchmarks.harness.cells import Results
from benchmarks.harness.presets import PRESETS
from benchmarks.harness.running import RESULTS
from benchmarks.harness.tables import Record, Section, by_method, by_point, chosen, matrix, verdicts
from deferral.datasets import DataError

PAGE = Path(__file__).parent.parent / "docs" / "reproduction.md"
INTRODUCTION = """\
# Published tables, repeated

Written by `python -m benchmarks report` from the cells in `benchmarks/results`; every cell names its settings, versions and
commit.  Published figures stand beside ours where they are known to us.

How to read the tables.  A cost is the mean over the test rows, in errors; with several seeds it is the mean ± the deviation over
seeds, with one seed ± half of its 95% bootstrap interval.  Thresholds are fitted on calibration rows for every method, baselines
included; "natural threshold" is the same scores without that.  A difference is paired over the test rows, its brackets cover
every seed's 95% interval.  "Cheaper" and "dearer" count the intervals that lie on one side of zero.  "Ours minus published" has
a 95% interval, over our seeds or over the test rows, whichever is the wider; in the published protocol (preset paper) a figure
is held where ours is at most the published one, not held where the whole interval lies above zero, and undecided in between.
Costs of what is kept are over the seeds that keep anything.
Minutes are sums over the cells, where other work on the machine makes them more; started twice, a command shares its cells
between two processes, a core each, and takes half as long.
"""


def _abstention_entries() -> dict[str, list[tuple[str, str]]]:
    return {
        name: [(data, f"c={cost:g}") for data, costs in PRESETS[name].costs.items() for cost in costs]
        for name in ("laptop", "fast", "paper")
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
    ),
    Section(
        title="Deferral to several experts on images",
        about=_claim(multi_expert, two_stage),
        commands=("multi-expert", "two-stage"),
        table=simulated.TABLE,
        methods=tuple(dict.fromkeys((*multi_expert.METHODS, *two_stage.METHODS))),
        entries={"laptop": SIMULATED, "fast": SIMULATED},
        seeds=3,
        layout="by_point",
    ),
    Section(
        title="Deferral to people",
        about=_claim(people),
        commands=("people",),
        table=people.TABLE,
        methods=(*people.BASELINES, *people.LEARNED),
        entries={"laptop": PEOPLE, "fast": PEOPLE},
        seeds=3,
        published=people.PUBLISHED,
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
    ),
)


def page(results: Results) -> str:
    """The whole page."""
    return "\n".join(
        [INTRODUCTION, *(line for section in SECTIONS for line in _section(section, results.read_all(section.table)))]
    )


def pictures(results: Results, folder: Path) -> list[Path]:
    """Cost over the number of experts, and over the number of training rows, for the tables that are curves."""
    from matplotlib.figure import Figure

    paths = []
    for section in SECTIONS:
        records = [r for r in results.read_all(section.table) if r["cell"]["preset"] == "laptop"]
        if section.layout != "by_point" or not records:
            continue
        entries = [entry for entry in section.entries["laptop"] if any(_of(r) == entry for r in records)]
        figure = Figure(figsize=(6.5 * min(2, len(entries)), 3.4 * -(-len(entries) // 2)), layout="constrained")
        for number, (data, cost) in enumerate(entries):
            axes = figure.add_subplot(-(-len(entries) // 2), min(2, len(entries)), number + 1)
            _draw(axes, section, records, data, cost)
        path = folder / f"reproduction-{section.table}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder of the cells.")
def command(out: Path) -> None:
    """The page and its pictures."""
    results = Results(out)
    try:
        text, paths = page(results), pictures(results, PAGE.parent)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    PAGE.write_text(text, encoding="utf-8")
    click.echo("\n".join(f"wrote {path}" for path in [PAGE, *paths]))


def main(arguments: list[str]) -> None:
    """Run from `python -m benchmarks`."""
    command.main(arguments, prog_name="python -m benchmarks report")


def _section(section: Section, records: Sequence[Record]) -> list[str]:
    lines = [f"## {section.title}", "", "```text", section.about.strip(), "```", ""]
    for preset, entries in section.entries.items():
        mine = [record for record in records if record["cell"]["preset"] == preset]
        where = "" if preset == "laptop" else " --device cuda"
        commands = " and ".join(f"`python -m benchmarks {name} --preset {preset}{where}`" for name in section.commands)
        lines += [f"### {section.title}: {preset}", "", f"{commands}.  {_provenance(mine)}", ""]
        if not mine and not section.published:
            continue
        summary = verdicts(section, mine, preset)
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
    return f"{len(records)} cells, {minutes:.1f} minutes of {measure}; {'; '.join(machines)}.{warning}"


def _mixed(records: Sequence[Record]) -> list[str]:
    """The data sets whose cells were trained in more than one way: a preset may change between two runs."""
    found: dict[str, set[str]] = {}
    for record in records:
        # How fast it was, and in which precision, is the machine's.
        way = {key: value for key, value in record["settings"].items() if key not in ("speed", "first_stage")}
        if recipe := way.get("recipe"):
            way["recipe"] = {key: value for key, value in recipe.items() if key not in ("bfloat16", "compiled")}
        found.setdefault(record["cell"]["data"], set()).add(json.dumps(way, sort_keys=True))
    return sorted(data for data, ways in found.items() if len(ways) > 1)


def _of(record: Record) -> tuple[str, str]:
    return record["cell"]["data"], record["cell"]["cost"]


def _draw(axes, section: Section, records: Sequence[Record], data: str, cost: str) -> None:
    markers = "osD^vP*X<>hp8d"
    for number, method in enumerate(section.methods):
        cells = chosen(records, "laptop", data, cost, method)
        if not cells:
            continue
        (what, _), *_ = cells[0]["parts"][0]["at"].items()
        points = [part["at"][what] for part in cells[0]["parts"]]
        costs = [[part["cost"]["estimate"] for part in cell["parts"]] for cell in cells]
        means = [section.scale * sum(column) / len(column) for column in zip(*costs, strict=True)]
        # A method looks the same in every panel; baselines are dashed.
        style = "--" if method in section.methods[:3] else "-"
        marker = markers[number % len(markers)]
        axes.plot(points, means, style, marker=marker, color=f"C{number % 10}", markersize=4, label=method)
        axes.set_xscale("log")
        axes.set_xticks(points, [f"{point:g}" for point in points])
        axes.minorticks_off()
        axes.set_xlabel(what)
    axes.set_ylabel(f"cost, {section.unit}")
    axes.set_title(f"{data}: {cost}", fontsize="small", loc="left")
    axes.legend(fontsize="xx-small", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
