"""The `deferral` command: parses and prints, decides nothing."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deferral
from deferral.errors import DataError, installing

try:
    import click
    from click.core import ParameterSource
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from deferral.command_line import Commands, FiniteRange
except ModuleNotFoundError as error:
    sys.exit(f"the command line needs {error.name}: {installing('cli')}")

if TYPE_CHECKING:
    import torch

__all__ = ["main"]

_ELSEWHERE = {
    "gateway": ("deferral.gateway.commands", "A gateway's first log, checks, API keys, record, retraining and status."),
    "route": ("deferral.routing.commands", "Learn from a log which language model should answer."),
    "serve": ("deferral.gateway.serve", "An OpenAI-compatible gateway around a router."),
}
# A seed is also multiplied by a thousand, and torch's generators end at 64 bits.
_SEED = click.IntRange(0, 2**32 - 1)
_OF_A_CLONE = ("benchmarks/__main__.py", "deferral/__init__.py")


@click.group(cls=Commands, elsewhere=_ELSEWHERE, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(deferral.__version__, prog_name="deferral")
def commands() -> None:
    """Systems that know when not to answer: abstain at a known cost, or defer to experts."""
    # What was logged, or a mere sign, may not be writable here: half a surrogate pair, or anything else than ASCII.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@commands.group(invoke_without_command=True)
@click.option("--data", type=click.Choice(["digits", "cifar10"]), default="digits", show_default=True)
@click.option("--seed", type=_SEED, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="A torch device: cpu, cuda, cuda:1.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("deferral-demo"),
    show_default=True,
    help="Folder for pictures, figures and checkpoints.",
)
@click.option("--useless-expert", is_flag=True, help="digits: add an expert D that guesses, and is dear.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    envvar="DEFERRAL_DATA",
    help="cifar10: the folder that holds cifar-10-batches-py.  [default: $DEFERRAL_DATA]",
)
@click.option(
    "--people",
    type=click.Path(path_type=Path),
    help="cifar10: the folder with cifar10n.npz and cifar10h_counts.npy.  [default: ROOT/l2d]",
)
@click.pass_context
def demo(
    context: click.Context,
    data: str,
    seed: int,
    device: str,
    out: Path,
    useless_expert: bool,
    root: Path | None,
    people: Path | None,
) -> None:
    """A model decides what to answer and what to hand to whom, and what that saves.

    digits: handwritten digits and three simulated experts, under a minute.  cifar10: real photographs and real people's
    answers, some ten minutes; stopped and started again, it continues at the last epoch.
    """
    if context.invoked_subcommand is not None:
        given = (name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
        if (name := next(given, None)) is not None:
            option, command = name.replace("_", "-"), context.invoked_subcommand
            raise click.UsageError(f"--{option} is not of `demo {command}`; give options of {command} after its name")
        return
    # Imported here: `deferral --help` must not wait for torch and scikit-learn, nor a gateway hold them.
    import torch

    from deferral.demo import cifar10, digits
    from deferral.evaluation.pictures import draw
    from deferral.evaluation.report import save, show

    target = _device(device)
    if root is not None and not root.is_dir():
        raise click.UsageError(f"--root: there is no folder {root}")
    if data == "cifar10" and root is None:
        raise click.UsageError("--data cifar10 needs --root, the folder that holds cifar-10-batches-py (or DEFERRAL_DATA)")
    if data == "cifar10" and useless_expert:
        raise click.UsageError("--useless-expert goes with --data digits")
    out.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        if data == "digits":
            # Layers this small are slower on several threads than on one.
            torch.set_num_threads(1)
            comparisons = [digits.run(seed, target, progress, useless_expert=useless_expert)]
        else:
            assert root is not None
            checkpoint = out / f"cifar10-seed{seed}.pt"
            comparisons = cifar10.run(root, people or root / "l2d", seed, target, progress, checkpoint)
    for comparison in comparisons:
        files = [*draw(comparison, out), save(comparison, out)]
        show(comparison)
        click.echo("\n".join(f"wrote {path}" for path in files) + "\n")


@demo.command("gateway")
@click.option("--questions", "count", type=click.IntRange(50, 1000), default=1000, show_default=True, help="How many are asked.")
@click.option("--seed", type=_SEED, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the models and the router; what is there is used again.  [default: in the user's cache]",
)
@click.option("--serve", "stay", is_flag=True, help="Stay up afterwards, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the gateway.  [default: one that is free]")
def demo_gateway(count: int, seed: int, out: Path | None, stay: bool, port: int) -> None:
    """Two tiny language models, a router and the gateway: what routing saves.

    The models are trained on this machine, in some minutes; the next run finds them.  Nothing is downloaded.
    """
    from deferral.demo import gateway
    from deferral.demo.routed import how_to_call, show

    # Ended in this way, too, it leaves no server behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        _progress() as progress,
        gateway.running(out or gateway.cache_folder(), count, seed, progress, port=port) as (result, url),
    ):
        progress.stop()
        show(result)
        if stay:
            click.echo(how_to_call(url))
            with suppress(KeyboardInterrupt):
                threading.Event().wait()


@commands.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--price", "prices", multiple=True, metavar="NAME=COST", help="What asking the expert NAME costs, in errors.")
@click.option("--abstain-cost", type=float, help="What abstaining costs, in errors; needed where rows may abstain, in all files.")
@click.option(
    "--calibrate",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the rows, drawn at random, that fits a threshold per method; the others judge it.",
)
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the rows drawn by --calibrate.")
@click.option("--regression", is_flag=True, help="Targets and answers are numbers, costs squared errors.")
@click.option(
    "--level",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of all intervals.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("deferral-evaluation"),
    show_default=True,
    help="Folder for pictures and figures.",
)
def evaluate(
    files: tuple[Path, ...],
    prices: tuple[str, ...],
    abstain_cost: float | None,
    calibrate: float,
    seed: int,
    regression: bool,
    level: float,
    out: Path,
) -> None:
    """Judge the outputs of any tool: costs, intervals, paired differences, curves, baselines.

    FILES are CSV or Parquet, one for each method, all with the same rows in the same order.  Columns: target, answer (the
    model's), answer_NAME (expert NAME's; empty where missing), score and score_NAME (higher is preferred), score_abstain,
    action (own, NAME or abstain: who answered, if not the highest score), probability and probability_NAME (P(right)).  Other
    columns are not read.
    """
    from deferral.evaluation.evaluate import evaluate as judge
    from deferral.evaluation.pictures import draw_evaluation
    from deferral.evaluation.report import save_evaluation, save_rows, show_evaluation

    costs = [_price(price) for price in prices]
    names = [name for name, _ in costs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise click.BadParameter(f"{min(repeated)!r} has two prices", param_hint="--price")
    # A folder that cannot be written must not be found out after minutes of resampling.
    out.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("reading") as status:
        evaluation = judge(
            files,
            prices=dict(costs),
            abstain_cost=abstain_cost,
            calibration_share=calibrate,
            seed=seed,
            regression=regression,
            level=level,
            on_stage=status.update,
        )
    written, left_out = [save_evaluation(evaluation, out), save_rows(evaluation, out)], ""
    try:
        written += draw_evaluation(evaluation, out)
    except ImportError as error:
        left_out = f"the pictures are left out: {error}\n"
    show_evaluation(evaluation)
    click.echo(left_out, nl=False)
    click.echo("\n".join(f"wrote {path}" for path in written))


@commands.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="NAME [OPTIONS]")
def bench(arguments: tuple[str, ...]) -> None:
    """Repeat an experiment of the thesis: python -m benchmarks NAME, from a checkout.

    Without a name it lists them; `deferral bench NAME --help` has the options of one.
    """
    # An installed package has none beside it; the caller may stand in a clone.
    folders = Path(deferral.__file__).parent.parent, Path.cwd()
    checkout = next((one for one in folders if all((one / path).is_file() for path in _OF_A_CLONE)), None)
    if checkout is None:
        raise click.UsageError(
            "the benchmarks are scripts of the repository and not part of the installed package; clone it, and run the same "
            "command there"
        )
    # The caller's folder stays the working one: paths in the arguments are relative to it.
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *arguments]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        while process.poll() is None:
            # Ctrl-C reaches the script too, which ends at its own pace and says how to continue.
            with suppress(KeyboardInterrupt):
                process.wait()
    sys.exit(process.returncode)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; errors in arguments and data are printed without a traceback, with a non-zero exit status."""
    try:
        commands.main(arguments, prog_name="deferral", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        words = sys.argv[1:] if arguments is None else arguments
        again = "; the same command goes on from its last checkpoint, if it has written one" if "demo" in words[:1] else ""
        click.echo(f"stopped{again}", err=True)
        sys.exit(130)
    except (DataError, ImportError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


def _price(text: str) -> tuple[str, float]:
    name, _, cost = text.rpartition("=")
    try:
        price = float(cost)
    except ValueError:
        name = ""
    if not name:
        raise click.BadParameter(f"expected NAME=COST, got {text!r}", param_hint="--price")
    return name, price


def _progress() -> Progress:
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise click.BadParameter(
            f"{name!r} cannot be used here; expected one of {', '.join(available)}", param_hint="--device"
        ) from error
    return device


if __name__ == "__main__":
    main()
