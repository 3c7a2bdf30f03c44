"""Simulated experts of the multi-expert tables, and the cells that `multi-expert` and `two-stage` share.

Kinds, skills and seeds were fixed before any result was seen:
random       right with a probability drawn from [0.5, 0.95] for each expert, on every class alike
specialised  perfect on two classes (expert j on 2j and 2j + 1, counted modulo 10), guesses on the others
overlapping  perfect on five classes drawn at random, guesses on the others
equal        right with probability 0.8 on every class, independently of each other
"""

from collections.abc import Sequence
from functools import cache, lru_cache, partial

import torch
from torch import Tensor

from benchmarks.harness.asking import BASELINES, METHODS, Asked, Task
from benchmarks.harness.cells import Cell
from benchmarks.harness.images import CLASSES
from benchmarks.harness.judging import Judged
from benchmarks.harness.running import Finding, Part, Run, settings_of
from benchmarks.harness.stage1 import Rows, first_stage
from deferral.experts import draw_answers, even_skill, specialist

__all__ = ["KINDS", "PRICES", "TABLE", "confusions", "run_cells"]

TABLE = "multi-expert"
KINDS = ("random", "specialised", "overlapping", "equal")
PRICES = (0.0, 0.05)
MOST = 20
SKILL_SEED = 2024


def confusions(kind: str, num_classes: int) -> list[Tensor]:
    """The confusion matrices of the experts 0 .. 19; a problem with E experts has the first E."""
    generator = torch.Generator().manual_seed(SKILL_SEED)
    if kind == "random":
        return [even_skill(0.5 + 0.45 * float(share), num_classes) for share in torch.rand(MOST, generator=generator)]
    if kind == "specialised":
        return [specialist([2 * j % num_classes, (2 * j + 1) % num_classes], num_classes) for j in range(MOST)]
    if kind == "overlapping":
        orders = [torch.randperm(num_classes, generator=generator) for _ in range(MOST)]
        return [specialist(order[: num_classes // 2].tolist(), num_classes) for order in orders]
    return [even_skill(0.8, num_classes) for _ in range(MOST)]


def answers(rows: Rows, kind: str, number: int, num_classes: int, seed: int) -> Tensor:
    """What the first experts of a kind answer; each draws with a seed of its own.  -> (N, E)"""
    matrices = confusions(kind, num_classes)[:number]
    columns = [draw_answers(matrix, rows.labels, seed=100 * seed + j) for j, matrix in enumerate(matrices)]
    return torch.stack(columns, dim=-1)


def run_cells(run: Run, methods: Sequence[str], data_sets: Sequence[str]) -> None:
    """Every open cell; a cell is a curve over the number of experts."""
    cells = [
        Cell(TABLE, data, method, f"{kind}, price {price:g}", seed, run.preset_name)
        for data in data_sets
        for seed in range(run.seeds)
        for kind in KINDS
        for price in PRICES
        for method in methods
    ]
    stage = cache(partial(first_stage, run))

    @lru_cache(8)
    def task(data: str, seed: int, cost: str, number: int) -> Task:
        kind, price = cost.split(", price ")
        first = stage(data, seed)
        classes = CLASSES[data]

        def asked(rows: Rows, purpose: int) -> Asked:
            return Asked(rows, answers(rows, kind, number, classes, 3 * seed + purpose))

        parts = asked(first.stage2, 0), asked(first.calibration, 1), asked(first.test, 2)
        return Task(*parts, float(price), classes, seed, run.preset.head_steps)

    @lru_cache(8)
    def references(data: str, seed: int, cost: str, number: int) -> dict[str, Judged]:
        return task(data, seed, cost, number).baselines()

    def work(cell: Cell) -> Finding:
        parts = []
        for number in run.preset.experts:
            what = (cell.data, cell.seed, cell.cost, number)
            others = dict(references(*what))
            judged = others.pop(cell.method) if cell.method in BASELINES else METHODS[cell.method](task(*what))
            parts.append(Part(judged, others, {"experts": number}))
        return Finding(parts)

    run.each(cells, work, lambda cell: {**settings_of(run, cell.data), "head_steps": run.preset.head_steps})
