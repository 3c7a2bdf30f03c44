"""Per-row outputs of a system, from a table in a file: whatever tool wrote it, one line a row.

Columns, of which `target` and `answer` must be there:

    target               the true label, or a number in regression
    answer               the own predictor's answer
    answer_NAME          expert NAME's answer; empty where it is missing
    score, score_NAME    higher is preferred: the own score, and one for each expert; the highest answers
    score_abstain        the same for abstaining
    action               who answered, if not the highest score: own, the expert's name, or abstain
    probability, probability_NAME   P(the answer is right), for reliability and for the baseline compare-confidence

Other columns are not read, unless they look like one of these in another spelling, which is an error.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deferral.decision import decide
from deferral.errors import DataError
from deferral.evaluation.comparison import ABSTAIN, MODEL, OWN
from deferral.evaluation.table import Table
from deferral.labels import FEW_ANSWERS, misspelt

__all__ = ["Outputs", "read_outputs"]

_RESERVED = (OWN, ABSTAIN, MODEL, "abstaining", "")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


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
    ignored: list[str]  # columns that were not read


def read_outputs(path: Path, *, regression: bool = False) -> Outputs:
    """Read a .csv or .parquet file with the columns above.  DataError names the row (the first is 1) and the column."""
    table = Table(path)
    experts = [name.removeprefix("answer_") for name in table.names if name.startswith("answer_")]
    if reserved := [name for name in experts if name in _RESERVED]:
        raise DataError(f"{path}: an expert cannot be called {reserved[0]!r}; rename the column 'answer_{reserved[0]}'")
    ignored = _unread(table, experts)
    abstains = "score_abstain" in table.names or ("action" in table.names and ABSTAIN in table.text("action"))
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
    probabilities = _probabilities(table, experts)
    return Outputs(path.stem, experts, abstains, labels, targets, answers, mask, scores, actions, probabilities, ignored)


def _unread(table: Table, experts: list[str]) -> list[str]:
    """The columns that are none of an output's; DataError where one must be there, or another is one in another spelling."""
    if missing := [name for name in ("target", "answer") if name not in table.names]:
        split = "; separate the cells by commas" if len(table.names) == 1 and re.search("[;\t|]", table.names[0]) else ""
        raise DataError(f"{table.path}: there is no column {missing[0]!r}; the columns are {', '.join(table.names)}{split}")
    known = {"target", "answer", "action", "score", "score_abstain", "probability"}
    known |= {f"{kind}_{name}" for kind in ("answer", "score", "probability") for name in experts}
    unread = [name for name in table.names if name not in known]
    for name in unread:
        meant = _looks_like(name, sorted(known))
        if meant is not None or name.casefold().startswith(("answer", "score", "probab")):
            asked = f"did you mean {meant!r}?  Rename it" if meant else "rename it"
            raise DataError(
                f"{table.path}: column {name!r} is not one of {', '.join(sorted(known))}; {asked}, or leave it out (an "
                "expert needs a column answer_NAME)"
            )
    return unread


def _looks_like(name: str, known: list[str]) -> str | None:
    """The known name that differs in case, in the order of its words, or by a letter or so."""
    spelt = {_folded(other): other for other in known}
    close = get_close_matches(_folded(name), spelt, n=1, cutoff=0.87)
    return spelt[close[0]] if close else None


def _folded(name: str) -> str:
    return "_".join(sorted(re.findall(r"[^\W_]+", name.casefold())))


def _labels(table: Table, columns: list[str]) -> tuple[list[str], Tensor]:
    """The names of the labels, and their indices (N, columns), -1 where an expert's cell is empty."""
    cells = [table.labels(name) for name in columns]
    for name in ("target", "answer"):
        if "" in (column := cells[columns.index(name)]):
            raise table.bad(column.index(""), name, "a label (NA, nan, null and None are read as missing)")
    truth = set(cells[0])
    for name, column in zip(columns[1:], cells[1:], strict=True):
        given = set(column) - {""}
        for label, meant in misspelt(given, truth).items():
            raise table.bad(column.index(label), name, f"{meant!r}, as the target spells it (the answer would count as wrong)")
        # 0 and 1 beside false and true, Cat beside cat: written by another hand, and all wrong if taken as they are.
        many = len(column) - column.count("") >= FEW_ANSWERS
        if given and not given & truth and (many or _numeric(given) != _numeric(truth)):
            raise DataError(
                f"{table.path}: column {name!r}: expected labels like those of the target ({_some(truth)}), got {_some(given)}"
            )
    names = sorted({cell for column in cells for cell in column if cell}, key=_by_number)
    order = {name: index for index, name in enumerate(names)} | {"": -1}
    return names, torch.tensor([[order[cell] for cell in column] for column in cells]).T.contiguous()


def _numeric(labels: set[str]) -> bool:
    return all(_NUMBER.fullmatch(label) for label in labels)


def _some(labels: set[str]) -> str:
    return ", ".join(sorted(labels, key=_by_number)[:3]) + (", .." if len(labels) > 3 else "")


def _by_number(label: str) -> tuple[float, str]:
    return (float(label) if _NUMBER.fullmatch(label) else float("inf"), label)


def _scores(table: Table, experts: list[str], abstains: bool, mask: Tensor) -> Tensor | None:
    columns = ["score", *(f"score_{name}" for name in experts), *(["score_abstain"] if abstains else [])]
    if not any(name.startswith("score") for name in table.names):
        return None
    if missing := [name for name in columns if name not in table.names]:
        raise DataError(f"{table.path}: there is no column {missing[0]!r}; every action needs a score, or none has one")
    own = ("score", "score_abstain")
    scores = torch.stack(
        [torch.from_numpy(table.numbers(name, empty=name not in own, closed=name not in own)) for name in columns], dim=-1
    )
    bad = (scores.isnan() & mask).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise table.bad(row, columns[column], "a score, since the expert answered")
    return scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _actions(table: Table, names: list[str], mask: Tensor) -> Tensor:
    number = {name: index for index, name in enumerate(names)}
    cells = table.text("action")
    for row, cell in enumerate(cells):
        if cell not in number:
            raise table.bad(row, "action", f"one of {', '.join(names)}")
        if not mask[row, number[cell]]:
            raise table.bad(row, "action", f"someone who answered (answer_{cell} is empty)")
    return torch.tensor([number[cell] for cell in cells])


def _probabilities(table: Table, experts: list[str]) -> Tensor | None:
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
