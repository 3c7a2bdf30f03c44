"""One run of a script: which cells are still open, what has been learned about them, and when to stop."""

import ctypes
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import deferral
from benchmarks.harness import ranks
from benchmarks.harness.cells import Cell, NotFinite, Results
from benchmarks.harness.images import fetch, load
from benchmarks.harness.judging import Judged, figures
from benchmarks.harness.presets import PRESETS, Preset
from benchmarks.harness.progress import Display
from benchmarks.harness.settings import differing
from benchmarks.harness.training import Diverged, OutOfTime, Recipe, Watch
from deferral.datasets import DataError, Images, NotFound

__all__ = [
    *("RESULTS", "Busy", "Finding", "Part", "Run"),
    *("commit", "data_folder", "image_options", "options", "running", "settings_of", "usable_device"),
]

RESULTS = Path(__file__).parent.parent / "results"
_PATIENCE = 0.2  # seconds between two looks at a lock
_FOR = {
    "laptop": "two CPU cores",
    "fast": "a small network on a GPU",
    "paper": "networks and schedules as published, on a GPU",
    "tiny": "for tests, proves nothing",
    "inner": "settings were chosen on it",
}


class Busy(Exception):
    """Another process makes what this cell needs, and holds the `lock` meanwhile."""

    def __init__(self, lock: str) -> None:
        super().__init__(f"another process holds {lock}")
        self.lock = lock


@dataclass(frozen=True)
class Part:
    """One point of a cell: what it is at (say experts=4), its judged rows, and the references on the same rows."""

    judged: Judged
    references: Mapping[str, Judged]
    at: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What the work on a cell has found, and how fast its networks were trained."""

    parts: Sequence[Part]
    speeds: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The options of a script, and the folder its cells are in."""

    results: Results
    display: Display
    preset_name: str
    device: torch.device
    root: Path | None
    seeds: int
    most_cells: int | None
    deadline: float
    bfloat16: bool
    compiled: bool
    download: bool
    presets: Mapping[str, Preset]

    @property
    def preset(self) -> Preset:
        """The rows, networks and costs of the preset."""
        return self.presets[self.preset_name]

    @property
    def recipe(self) -> Recipe:
        """The preset's recipe at this run's precision."""
        return replace(self.preset.recipe, bfloat16=self.bfloat16, compiled=self.compiled)

    @property
    def data_root(self) -> Path:
        """The folder of real data, or an error that says how to name it."""
        return data_folder(self.root)

    def images(self, data: str) -> tuple[Images, Images]:
        """Training and test images of a data set, on this run's device."""
        if self.download and ranks.first():
            fetch(data, self.data_root)
        ranks.meet()
        return load(data, self.data_root, self.device)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """The lock of that name as in `Results.claim`, held by the first rank for all."""
        with self.results.claim(name) if ranks.first() else nullcontext(False) as mine:
            yield bool(ranks.agree(mine))

    def watch(self, what: str, epochs: int) -> Watch:
        """Shows a training's epochs and stops it at the deadline."""
        return Watch(lambda epoch, loss: self.display.epoch(what, epoch, epochs, loss), self.deadline)

    def each(self, cells: Sequence[Cell], work: Callable[[Cell], Finding], settings: Callable[[Cell], Mapping[str, Any]]) -> None:
        """Do the cells that are neither finished nor claimed by another process; those that need what another makes come last.

        `settings` are what a reader of a cell needs to know of how it is made.
        A cell that diverges, or has a figure that is not finite, is told and left open, and the others go on.
        Raises OutOfTime when the deadline has passed.
        """
        done, diverged = 0, 0
        there = [cell for cell in cells if self.results.finished(cell)]
        self.display.start(cells, len(there))
        self._tell_others(there, settings)
        if len(there) == len(cells):
            self.display.say(
                f"all {len(there)} cells are in {self.results.folder} already; --out DIR makes them again, in another folder"
            )
        postponed: list[tuple[Cell, str]] = []
        # What is postponed meanwhile is seen too.
        for cell, awaited in chain(((cell, "") for cell in cells), postponed):
            if ranks.agree(self.results.finished(cell)):
                if ranks.first():
                    # A run that was killed between the two leaves it.
                    self.results.checkpoint(cell).unlink(missing_ok=True)
                continue
            if done == self.most_cells:
                break
            if ranks.agree(time.monotonic() > self.deadline):
                raise OutOfTime
            if awaited:
                self._await(awaited)
            with self.claim(f"{cell.table}-{cell.preset}-{cell.name}") as mine:
                # Another process may have finished it since.
                if not mine or ranks.agree(self.results.finished(cell)):
                    continue
                self.display.cell(cell)
                started, cpu = time.monotonic(), time.process_time()
                finding = None
                try:
                    finding = work(cell)
                    if ranks.first():
                        self._finish(cell, finding, settings(cell), time.monotonic() - started, time.process_time() - cpu)
                except (Diverged, NotFinite) as error:
                    finding = None
                    self.display.say(f"diverged: {cell.table}, {cell.name}: {error}")
                except Busy as busy:
                    postponed.append((cell, busy.lock))
                    continue
                if ranks.agree(finding is not None):
                    done += 1
                else:
                    diverged += 1
        if diverged:
            raise click.ClickException(f"{diverged} cells diverged and are left open")

    def _tell_others(self, finished: Sequence[Cell], settings: Callable[[Cell], Mapping[str, Any]]) -> None:
        """Says how many finished cells were made in another way than this run would make them."""
        differences = [differing(self.results.record(cell).get("settings", {}), settings(cell)) for cell in finished]
        others = [names for names in differences if names]
        if others:
            names = ", ".join(sorted(set().union(*others)))
            self.display.say(
                f"kept {len(others)} finished cells that were made with other settings ({names}); --out DIR makes them with "
                "these, in another folder"
            )

    def _await(self, lock: str) -> None:
        """Returns when no other process holds the lock.  Raises OutOfTime at the deadline."""
        while True:
            with self.claim(lock) as free:
                if free:
                    return
            if ranks.agree(time.monotonic() > self.deadline):
                raise OutOfTime
            time.sleep(_PATIENCE)

    def _finish(self, cell: Cell, finding: Finding, settings: Mapping[str, Any], seconds: float, cpu_seconds: float) -> None:
        record = {
            "parts": [{"at": dict(part.at), **figures(part.judged, part.references)} for part in finding.parts],
            "settings": {**settings, **finding.speeds},
            "machine": {**self.machine, "bfloat16": self.bfloat16},
            "wall_seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
        }
        samples = {
            f"{name}{number}": values.cpu().numpy().astype(np.float32)
            for number, part in enumerate(finding.parts)
            for name, values in vars(part.judged).items()
            if values is not None
        }
        self.results.write(cell, record, samples)
        self.results.checkpoint(cell).unlink(missing_ok=True)
        self.display.finished(cell, record)

    @cached_property
    def machine(self) -> dict[str, str]:
        """Versions, device and commit."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "threads": str(torch.get_num_threads()),
            "deferral": deferral.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            **_versions("scikit-learn", "scipy"),
            "python": platform.python_version(),
            "commit": commit(),
            **({"ranks": str(ranks.count())} if ranks.count() > 1 else {}),
        }


def options(
    *, presets: Sequence[str] = tuple(PRESETS), seeds: int | None = 3, device: bool = True, root: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that every script takes; a device, a folder of data and a number of seeds, where it has use for them."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        shared = [
            click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder of the cells."),
            click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of torch."),
            click.option("--budget-minutes", type=click.FloatRange(min=0), help="Stop at the first checkpoint after this time."),
            click.option("--cells", "most_cells", type=click.IntRange(min=1), help="Stop after this many new cells."),
            click.option("--quiet", is_flag=True, help="One line a cell, for logs."),
        ]
        if root:
            folder, about = click.Path(file_okay=False, path_type=Path), "Folder of the data.  [default: $DEFERRAL_DATA]"
            shared.append(click.option("--root", type=folder, envvar="DEFERRAL_DATA", help=about))
        if seeds is not None:
            number = click.IntRange(min=1)
            shared.append(click.option("--seeds", type=number, default=seeds, show_default=True, help="Seeds 0 .. N-1."))
        if device:
            about = "A torch device: cpu, cuda, cuda:1; with torchrun cpu or cuda."
            shared.append(click.option("--device", default="cpu", show_default=True, help=about))
        names = click.Choice(presets)
        about = "; ".join(f"{name}: {_FOR[name]}" for name in presets if name in _FOR) + "."
        shared.append(click.option("--preset", "preset_name", type=names, default=presets[0], show_default=True, help=about))
        for option in reversed(shared):
            function = option(function)
        return function

    return add


def image_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of scripts that train networks on images."""
    precision = click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 on CUDA and on a CPU with matrix units for it.",
    )
    compiled = click.option("--compile", "compiled", is_flag=True, help="Compile the network by inductor.")
    download = click.option("--download", is_flag=True, help="Download images that --root does not have, by torchvision.")
    return precision(compiled(download(function)))


@contextmanager
def running(
    *,
    out: Path,
    threads: int,
    budget_minutes: float | None,
    most_cells: int | None,
    quiet: bool,
    root: Path | None = None,
    seeds: int = 1,
    device: str = "cpu",
    preset_name: str = "laptop",
    precision: str = "float32",
    compiled: bool = False,
    download: bool = False,
    presets: Mapping[str, Preset] = PRESETS,
) -> Iterator[Run]:
    """A run from its options; being out of time is an end like any other, and errors are told without a traceback."""
    torch.set_num_threads(threads)
    _keep_freed_memory()
    if budget_minutes is not None and math.isnan(budget_minutes):
        raise click.UsageError("--budget-minutes: expected a number, got nan")
    deadline = math.inf if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    with ranks.group(usable_device(device)) as target, Display(quiet, silent=not ranks.first()) as display:
        run = Run(
            results=Results(out),
            display=display,
            preset_name=preset_name,
            device=target,
            root=root,
            seeds=seeds,
            most_cells=most_cells,
            deadline=deadline,
            bfloat16=precision == "bfloat16" or (precision == "auto" and _fast_bfloat16(target)),
            compiled=compiled,
            download=download,
            presets=presets,
        )
        try:
            yield run
        except OutOfTime:
            display.say("the time budget is spent; the same command continues from the last checkpoint")
        except KeyboardInterrupt:
            display.say("stopped; the same command continues from the last checkpoint")
            raise SystemExit(130) from None
        except NotFound as error:
            raise click.ClickException(f"{error.what}; --root, or DEFERRAL_DATA, names the folder of all data") from error
        except (DataError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            stays = "; what is finished stays, the same command continues from the last checkpoint"
            raise click.ClickException(f"{error} (the cells are in {out}){stays if run.results.begun() else ''}") from error


def settings_of(run: Run, data: str) -> dict[str, Any]:
    """What a reader of an image cell needs to know of its training."""
    preset = run.preset
    return {
        "network": preset.network[data],
        "rows": {"predictor": preset.predictor_rows, "stage 2": preset.stage2_rows, "calibration": preset.calibration_rows},
        "recipe": asdict(run.recipe),
    }


def data_folder(root: Path | None) -> Path:
    """The folder that --root or DEFERRAL_DATA names.  Raises UsageError where neither does."""
    if root is None:
        raise click.UsageError("name the folder of the data with --root, or set DEFERRAL_DATA")
    return root


def usable_device(name: str) -> torch.device:
    """The device of that name.  Raises UsageError where this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise click.UsageError(f"--device {name}: expected a torch device, say cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if found <= (device.index or 0):
            raise click.UsageError(f"--device {name}: torch {torch.__version__} finds {found} GPUs on this machine")
        # Every batch but the last of an epoch has one shape, for which the fastest convolutions are then looked up once.
        torch.backends.cudnn.benchmark = True
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise click.UsageError(f"--device {name}: it cannot be used on this machine") from error
    return device


def _versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed; only some cells need them."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _keep_freed_memory() -> None:
    """glibc gives large tables back to the kernel; to get them anew, page by page, was an eighth of a step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        allocator = ctypes.CDLL(None)
        allocator.mallopt(trim_threshold, 2**30)
        allocator.mallopt(mmap_threshold, 2**25)


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    processor = Path("/proc/cpuinfo")
    # Elsewhere bfloat16 is emulated, and slower than float32.
    return processor.is_file() and "amx_bf16" in processor.read_text(encoding="utf-8")


def commit() -> str:
    """The commit of this checkout, and whether its code was changed since."""
    try:
        folder = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "*.py"], cwd=folder.parent.parent, capture_output=True, text=True, check=True
        ).stdout
        return head + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
