"""The time and memory of each loss beside cross-entropy.  python -m benchmarks losses [--device cuda] [--compile] [--rounds 30]

Forward and backward of each loss as a ratio to `F.cross_entropy` with probability targets on scores of the same size: the median
over interleaved rounds, with the 10th and 90th percentile of the paired ratios, because machines are noisy; as a ratio to
`scores.sum().backward()`; and the peak memory of a step beyond its inputs, in units of the scores.  Compiled losses are compared
with compiled cross-entropy, and with eager cross-entropy beside it.  CPU: B = 4096, K = 100, E in {1, 8, 64}, float32, one thread
and all threads.  CUDA: B = 65536, K = 1000, float32 and bfloat16, with the share of the copy bandwidth of the same run (three
passes over the scores, one over the inputs).
"""

import json
import os
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.running import commit, usable_device
from deferral import losses
from deferral.losses.margin import exponential, logistic
from deferral.losses.predictor_rejector import constrained_rho_hinge, max_rho_margin

EAGER = "eager cross-entropy"  # beside compiled losses
AHEAD = 8  # matrix products of 8192 x 8192, 1.5 ms each on an H200, that a timed step on CUDA waits for
MOST_PAIRED = 200  # actions, for the losses that visit every pair
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Batch:
    """Inputs of one size; the scores have K + E columns."""

    scores: Tensor
    targets: Tensor
    law: Tensor  # probability targets over all columns, for the reference
    costs: Tensor  # (B, K+E)
    weights: Tensor  # 1 - costs
    expert_costs: Tensor
    expert_correct: Tensor
    rejector: Tensor
    num_classes: int

    @staticmethod
    def draw(rows: int, classes: int, experts: int, device: str, dtype: torch.dtype) -> "Batch":
        generator = torch.Generator().manual_seed(0)
        width = classes + experts

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator).to(device)

        costs = uniform(rows, width)
        return Batch(
            scores=torch.randn(rows, width, generator=generator).to(device, dtype),
            targets=torch.randint(classes, (rows,), generator=generator).to(device),
            law=uniform(rows, width).softmax(-1).to(dtype),
            costs=costs,
            weights=1 - costs,
            expert_costs=uniform(rows, experts),
            expert_correct=(uniform(rows, experts) < 0.5).float(),
            rejector=torch.randn(rows, generator=generator).to(device, dtype),
            num_classes=classes,
        )


Timed = Callable[[Tensor, Batch], Tensor]


def reference(scores: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(scores, batch.law, reduction="none")


def binary_reference(scores: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch.law, reduction="none").sum(-1)


def losses_of_experts(experts: int) -> dict[str, Timed]:
    """The losses by name; each is given scores of K + E columns."""
    table: dict[str, Timed] = {"F.cross_entropy": reference, "scores.sum": lambda s, b: s.sum(-1)}
    for mu in (1.0, 0.0, 1.7, 2.0):
        table[f"single_stage_deferral mu={mu:g}"] = partial(_single_stage, mu=mu)
        table[f"two_stage_deferral mu={mu:g}"] = partial(_two_stage, mu=mu)
    table["regression_deferral"] = lambda s, b: losses.regression_deferral(b.costs[:, 0], s, b.costs[:, 1:])
    table["BCE with logits"] = binary_reference
    table["one_vs_all"] = lambda s, b: losses.one_vs_all(s, b.targets, b.expert_correct)
    table["realizable_experts q=1"] = lambda s, b: losses.realizable_experts(s, b.targets, b.expert_correct)
    table["picce"] = lambda s, b: losses.picce(s, b.targets, b.expert_correct)
    table["sum_margin exponential"] = lambda s, b: losses.sum_margin(s, b.weights, phi=exponential)
    table["sum_margin logistic"] = lambda s, b: losses.sum_margin(s, b.weights, phi=logistic)
    table["constrained_margin exponential"] = lambda s, b: losses.constrained_margin(s, b.weights, phi=exponential)
    table["max_margin rho-margin"] = lambda s, b: losses.max_margin(s, b.weights)
    if experts == 1:
        for mu in (1.0, 0.0, 1.7, 2.0):
            table[f"score_based_abstention mu={mu:g}"] = partial(_score_based, mu=mu)
        table["predictor_rejector mae"] = lambda s, b: losses.predictor_rejector_abstention(s, b.rejector, b.targets, 0.1)
        table["predictor_rejector max_rho_margin"] = lambda s, b: losses.predictor_rejector_abstention(
            s, b.rejector, b.targets, 0.1, base=max_rho_margin
        )
        table["predictor_rejector constrained_rho_hinge"] = lambda s, b: losses.predictor_rejector_abstention(
            s, b.rejector, b.targets, 0.1, base=constrained_rho_hinge
        )
        table["realizable_deferral q=1"] = lambda s, b: losses.realizable_deferral(s, b.targets, b.expert_costs[:, 0])
        table["realizable_deferral q=0"] = lambda s, b: losses.realizable_deferral(s, b.targets, b.expert_costs[:, 0], q=0.0)
        for name in ("mozannar_sontag", "asymmetric_softmax", "realizable_surrogate"):
            table[name] = partial(_one_expert, name=name)
        table["deep_gamblers"] = lambda s, b: losses.deep_gamblers(s, b.targets, reward=2.2)
        table["cost_sensitive_abstention"] = lambda s, b: losses.cost_sensitive_abstention(s, b.targets, 0.1)
    return table


def _single_stage(scores: Tensor, batch: Batch, mu: float) -> Tensor:
    return losses.single_stage_deferral(scores, batch.targets, batch.expert_costs, mu=mu)


def _two_stage(scores: Tensor, batch: Batch, mu: float) -> Tensor:
    return losses.two_stage_deferral(scores, batch.costs, mu=mu)


def _score_based(scores: Tensor, batch: Batch, mu: float) -> Tensor:
    return losses.score_based_abstention(scores, batch.targets, 0.1, mu=mu)


def _one_expert(scores: Tensor, batch: Batch, name: str) -> Tensor:
    return getattr(losses, name)(scores, batch.targets, batch.expert_correct[:, 0])


def step(loss: Timed, batch: Batch) -> float:
    """Seconds of one forward and backward pass; on CUDA those of the device."""
    scores = batch.scores.detach().requires_grad_()
    if scores.is_cuda:
        return _step_on_cuda(loss, scores, batch)
    start = time.perf_counter()
    _forward_and_backward(loss, scores, batch)
    return time.perf_counter() - start


def _forward_and_backward(loss: Timed, scores: Tensor, batch: Batch) -> None:
    values = loss(scores, batch)
    values.backward(torch.full_like(values, 1 / len(values)))


def _step_on_cuda(loss: Timed, scores: Tensor, batch: Batch) -> float:
    """Queued behind matrix products, as a loss is behind its network: as long as they take longer than Python, the device never
    waits for it, its cache is full of other things, and a step that asks the device for a value is an error.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(AHEAD):
        torch.mm(_factor(), _factor(), out=_product())
    torch.cuda.set_sync_debug_mode("error")
    try:
        start.record()
        _forward_and_backward(loss, scores, batch)
        end.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _factor() -> Tensor:
    return torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)


@cache
def _product() -> Tensor:
    return torch.empty_like(_factor())


def ratios(table: dict[str, Timed], batch: Batch, rounds: int, *, compiled: bool) -> dict[str, dict[str, float]]:
    """Interleaved rounds, so that a machine that slows down slows all of them, each in an order of its own: a step is up to a
    fifth slower after a neighbour that leaves the caches and the heap full of other things.
    """
    timed = table | {EAGER: reference}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for name in timed:
        _forward_and_backward(timed[name], batch.scores.detach().requires_grad_(), batch)  # compiles it
    order = random.Random(0)
    for number in range(rounds + 3):
        for name in order.sample(list(timed), len(timed)):
            seconds = step(timed[name], batch)
            if number >= 3:
                times[name].append(seconds)
    eager_base = torch.tensor(times.pop(EAGER), dtype=torch.float64)
    base = torch.tensor(times["F.cross_entropy"], dtype=torch.float64)
    binary = torch.tensor(times["BCE with logits"], dtype=torch.float64)
    plain_sum = torch.tensor(times["scores.sum"], dtype=torch.float64)
    figures = {}
    for name, taken in times.items():
        seconds = torch.tensor(taken, dtype=torch.float64)
        quantiles = torch.quantile(seconds / (binary if name == "one_vs_all" else base), torch.tensor([0.5, 0.1, 0.9]).double())
        median, low, high = (round(value, 3) for value in quantiles.tolist())
        figures[name] = {
            "ratio": median,
            "p10": low,
            "p90": high,
            "over_sum": round(float((seconds / plain_sum).median()), 2),
            "peak_over_scores": round(peak_bytes(table[name], batch) / batch.scores.nbytes, 2),
            "milliseconds": round(1e3 * float(seconds.median()), 4),
        }
        if compiled:
            figures[name]["over_eager"] = round(float((seconds / eager_base).median()), 3)
    return figures


def peak_bytes(loss: Timed, batch: Batch) -> int:
    """The most memory that one step holds beyond its inputs, from the allocations that the profiler records."""
    if batch.scores.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, batch)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step(loss, batch)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]).cumsum(0)
    return int(held.max())


def on_cuda(table: dict[str, Timed], batch: Batch, figures: dict[str, dict[str, float]], bandwidth: float) -> None:
    """Adds the share of the copy bandwidth."""
    for name in table:
        inputs = batch.law.nbytes if name in ("F.cross_entropy", "BCE with logits") else batch.expert_costs.nbytes
        if "two_stage" in name or "margin" in name or "regression" in name:
            inputs = batch.costs.nbytes
        figures[name]["copy_share"] = round(
            (3 * batch.scores.nbytes + inputs) / (figures[name]["milliseconds"] / 1e3) / bandwidth, 3
        )


def copy_bandwidth() -> float:
    """Bytes read and written per second by the fastest of ten copies of 1 GiB."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        fastest = min(fastest, start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / fastest


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Time the losses compiled by inductor.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the JSON goes.  [default: benchmarks/results]"
)
def command(device: str, compiled: bool, rounds: int, out: Path | None) -> None:
    """Ratios of every loss to cross-entropy with probability targets."""
    usable_device(device)
    runs = []
    all_threads = torch.get_num_threads()
    settings: list[tuple[int, int, int, torch.dtype, int]] = [
        (4096, 100, experts, torch.float32, threads) for threads in sorted({1, all_threads}) for experts in (1, 8, 64)
    ]
    if device == "cuda":
        settings = [(65536, 1000, experts, dtype, all_threads) for dtype in (torch.float32, torch.bfloat16) for experts in (1, 8)]
    if device == "cpu":
        # What is measured first in a process pays for a heap that has not grown yet, cross-entropy twice its time: not counted.
        torch.set_num_threads(1)
        ratios(losses_of_experts(1), Batch.draw(4096, 100, 1, device, torch.float32), 3, compiled=False)
    for rows, classes, experts, dtype, threads in settings:
        torch.set_num_threads(threads)
        table = losses_of_experts(experts)
        if classes + experts > MOST_PAIRED:
            del table["sum_margin logistic"]
        if compiled:
            table = {name: torch.compile(loss, fullgraph=True, dynamic=False) for name, loss in table.items()}
            torch._dynamo.config.recompile_limit = 1000
        batch = Batch.draw(rows, classes, experts, device, dtype)
        figures = ratios(table, batch, rounds, compiled=compiled)
        about = {"B": rows, "K": classes, "E": experts, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
        if device == "cuda":
            bandwidth = copy_bandwidth()
            on_cuda(table, batch, figures, bandwidth)
            about["copy_terabytes_per_second"] = round(bandwidth / 1e12, 2)
        runs.append({**about, "losses": figures})
        click.echo("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
        for name, figure in figures.items():
            extra = f"  copy {figure['copy_share']:.2f}" if device == "cuda" else ""
            if compiled:
                extra += f"  {figure['over_eager']:6.2f} x eager"
            spread = f"[{figure['p10']:.2f}, {figure['p90']:.2f}]"
            click.echo(
                f"  {name:42} {figure['ratio']:6.2f}  {spread:14}  {figure['over_sum']:6.2f} x sum  "
                f"{figure['peak_over_scores']:6.2f} x memory  {figure['milliseconds']:8.3f} ms{extra}"
            )
    record = {
        "command": f"python -m benchmarks losses --device {device}" + (" --compile" if compiled else ""),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "rounds": rounds,
        "ratio": "to F.cross_entropy with probability targets; one_vs_all: to binary cross-entropy with logits",
        "runs": runs,
    }
    path = out or RESULTS / f"losses-{device}{'-compiled' if compiled else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(f"\nwrote {path}")
