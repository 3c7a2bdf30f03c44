"""Per-row outputs of a system, from a table in a file: whatever tool wrote it, one line a row.

Columns, of which `target` and `answer` must be there:

    target               the true label, or a number in regression
    answer               the own predictor's answer
    answer_NAME          expert NAME's answer; empty where it is missing
    score, score_NAME    higher is preferred: the own score, and one for each expert; the highest answers
    score_abstain        the same for abstaining
    action               who answered, if not the highest score: own, the expert's name, or abstain
    probability, probability_NAME   P(the answer is right), for reliability and for the baseline compare-confidence
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral.datasets import DataError
from deferral.decision import decide

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet
except ModuleNotFoundError as error:
    raise ImportError("reading tables of outputs needs pyarrow: pip install 'deferral[evaluate]'") from error

__all__ = ["Outputs", "read_outputs"]

OWN, ABSTAIN = "own", "abstain"


@dataclass(frozen=True)
class Outputs:
    """One method on N rows.  Actions are own, E experts, then abstaining where it is offered (answer -1)."""

    name: str
    experts: list[str]
    abstains: bool
    labels: list[str] | None  # None in regression
    targets: Tensor  # (N,) label indices or numbers
    answers: Tensor  # (N, A)
    mask: Tensor  # (N, A): the action can be taken
    scores: Tensor | None  # (N, A), float64
    actions: Tensor  # (N,)
    probabilities: Tensor | None  # (N, 1 + E), NaN where the file has none


def read_outputs(path: Path, *, regression: bool = False) -> Outputs:
    """Read a .csv or .parquet file with the columns above.  DataError names the row (the first is 1) and the column."""
    table = _Table(path)
    experts = [name.removeprefix("answer_") for name in table.names if name.startswith("answer_")]
    if OWN in experts or ABSTAIN in experts:
        raise DataError(f"{path}: an expert cannot be called {OWN!r} or {ABSTAIN!r}; rename the column")
    known = {"target", "answer", "action", "score", "score_abstain", "probability"}
    per_expert = {f"{kind}_{name}" for kind in ("answer", "score", "probability") for name in experts}
    if strange := sorted(set(table.names) - known - per_expert):
        raise DataError(
            f"{path}: column {strange[0]!r} is not one of {', '.join(sorted(known | per_expert))}; "
            "rename it, or leave it out (an expert needs a column answer_NAME)"
        )
    abstains = "score_abstain" in table.names or ("action" in table.names and ABSTAIN in set(table.text("action")))
    answer_columns = ["answer", *(f"answer_{name}" for name in experts)]
    labels: list[str] | None = None
    if regression:
        targets = torch.from_numpy(table.numbers("target"))
        columns = [torch.from_numpy(table.numbers(name, empty=name != "answer")) for name in answer_columns]
        answers = torch.stack(columns, dim=-1)
        mask = ~answers.isnan()
        answers = answers.nan_to_num(0.0)
    else:
        labels, indices = _labels(table, ["target", *answer_columns])
        targets, answers = indices[:, 0], indices[:, 1:]
        mask = answers >= 0
    if abstains:
        answers = torch.cat([answers, torch.full_like(answers[:, :1], -1)], dim=-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    scores = _scores(table, experts, abstains, mask)
    if "action" in table.names:
        actions = _actions(table, [OWN, *experts, *([ABSTAIN] if abstains else [])], mask)
    elif scores is not None:
        actions = decide(scores, mask=mask)
    else:
        raise DataError(f"{path}: nothing says who answers; give the columns score and score_NAME, or a column action")
    return Outputs(path.stem, experts, abstains, labels, targets, answers, mask, scores, actions, _probabilities(table, experts))


class _Table:
    """The file's columns as text, so that an error can name the cell as it was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.suffix == ".parquet":
                table = pa.parquet.read_table(path)
            elif path.suffix == ".csv":
                table = pa.csv.read_csv(path, convert_options=_as_text(path))
            else:
                raise DataError(f"{path}: expected a name that ends in .csv or .parquet")
        except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
        self.names: list[str] = table.column_names
        if repeated := {name for name in self.names if self.names.count(name) > 1}:
            raise DataError(f"{path}: column {min(repeated)!r} is there twice")
        if missing := [name for name in ("target", "answer") if name not in self.names]:
            raise DataError(f"{path}: there is no column {missing[0]!r}; the columns are {', '.join(self.names)}")
        if len(table) == 0:
            raise DataError(f"{path}: expected at least one row below the names of the columns")
        self._columns: dict[str, Any] = dict(zip(self.names, table.columns, strict=True))

    def text(self, name: str) -> list[str]:
        """The cells as written, "" where empty."""
        column = self._columns[name]
        try:
            text = pc.cast(column, pa.string())
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.path}: column {name!r}: expected text or numbers, got {column.type}") from error
        return [(cell or "").strip() for cell in text.to_pylist()]

    def numbers(self, name: str, *, empty: bool = False) -> np.ndarray:
        """The column as float64; empty cells are NaN where they are allowed."""
        cells = self.text(name)
        numbers = np.empty(len(cells))
        for row, cell in enumerate(cells):
            try:
                numbers[row] = float(cell) if cell else np.nan
            except ValueError:
                raise self.bad(row, name, "a number") from None
        wrong = ~np.isfinite(numbers) & ~(np.isnan(numbers) if empty else False)
        if name.startswith("score"):
            wrong &= ~np.isneginf(numbers)
        if wrong.any():
            raise self.bad(int(wrong.argmax()), name, "a finite number")
        return numbers

    def bad(self, row: int, name: str, expected: str) -> DataError:
        return DataError(f"{self.path}: row {row + 1}, column {name!r}: expected {expected}, got {self.text(name)[row]!r}")


def _as_text(path: Path) -> Any:
    with pa.csv.open_csv(path) as reader:
        names = reader.schema.names
    return pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)


def _labels(table: _Table, columns: list[str]) -> tuple[list[str], Tensor]:
    """Labels as indices (N, columns), -1 where an expert's cell is empty.  1 and 1.0 are one label: a tool wrote the second
    because a cell of the column was empty."""
    cells = [table.text(name) for name in columns]
    for name in ("target", "answer"):
        if "" in (column := cells[columns.index(name)]):
            raise table.bad(column.index(""), name, "a label")
    try:
        numbers = [[float(cell) if cell else None for cell in column] for column in cells]
        labels = sorted({number for column in numbers for number in column if number is not None})
        order: dict[Any, int] = {label: index for index, label in enumerate(labels)} | {None: -1}
        indices = [[order[number] for number in column] for column in numbers]
        return [f"{label:g}" for label in labels], torch.tensor(indices).T.contiguous()
    except ValueError:
        names = sorted({cell for column in cells for cell in column if cell})
        order = {name: index for index, name in enumerate(names)} | {"": -1}
        return names, torch.tensor([[order[cell] for cell in column] for column in cells]).T.contiguous()


def _scores(table: _Table, experts: list[str], abstains: bool, mask: Tensor) -> Tensor | None:
    columns = ["score", *(f"score_{name}" for name in experts), *(["score_abstain"] if abstains else [])]
    if not any(name.startswith("score") for name in table.names):
        return None
    if missing := [name for name in columns if name not in table.names]:
        raise DataError(f"{table.path}: there is no column {missing[0]!r}; every action needs a score, or none has one")
    scores = torch.stack(
        [torch.from_numpy(table.numbers(name, empty=name not in ("score", "score_abstain"))) for name in columns], dim=-1
    )
    bad = (scores.isnan() & mask).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise table.bad(row, columns[column], "a score, since the expert answered")
    return scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _actions(table: _Table, names: list[str], mask: Tensor) -> Tensor:
    number = {name: index for index, name in enumerate(names)}
    cells = table.text("action")
    for row, cell in enumerate(cells):
        if cell not in number:
            raise table.bad(row, "action", f"one of {', '.join(names)}")
        if not mask[row, number[cell]]:
            raise table.bad(row, "action", f"someone who answered (answer_{cell} is empty)")
    return torch.tensor([number[cell] for cell in cells])


def _probabilities(table: _Table, experts: list[str]) -> Tensor | None:
    columns = ["probability", *(f"probability_{name}" for name in experts)]
    if not any(name in table.names for name in columns):
        return None
    none = np.full(len(table.text("target")), np.nan)
    values = np.stack([table.numbers(name, empty=True) if name in table.names else none for name in columns], axis=-1)
    wrong = (values < 0) | (values > 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise table.bad(row, columns[column], "a probability in [0, 1]")
    return torch.from_numpy(values)
