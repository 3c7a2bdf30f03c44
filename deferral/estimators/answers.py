"""Experts' answers as they come (arrays, lists, frames, with gaps) become one table of the targets' type and a mask."""

from typing import Any

import numpy as np

__all__ = ["as_labels", "as_numbers", "free_label"]


def as_labels(answers: Any, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N, E) of the classes' type, and which are known.  Missing: masked, NaN, None, NA, and -1 if no class is -1.

    The texts "" and "nan" are answers.
    """
    expected = f"expert_answers: expected labels such as {classes[:3].tolist()} (missing: NaN, None or, among numbers, -1)"
    values, known = _table(answers)
    numeric = classes.dtype.kind in "biuf"
    if known.any() and values.dtype.kind in ("SU" if numeric else "biuf"):
        raise ValueError(f"{expected}, got {values.dtype}")
    filled = values.astype(object)
    filled[~known] = classes[0]
    if numeric and -1 not in classes:
        known &= filled != -1
        filled[~known] = classes[0]
    try:
        labels = filled.astype(str if classes.dtype.kind == "U" else classes.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{expected}: {error}") from error
    # astype cuts a number that is no label, such as 1.5 among integers.
    changed = labels != filled
    if changed.any():
        raise ValueError(f"{expected}, got {filled[changed][0]!r}")
    return labels, known


def as_numbers(answers: Any) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N, E), and which are known.  Missing: masked, NaN, None, NA."""
    values, known = _table(answers)
    try:
        numbers = np.where(known, values, 0.0).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expert_answers: expected numbers (missing ones NaN or None): {error}") from error
    if not np.isfinite(numbers).all():
        raise ValueError("expert_answers: expected finite numbers, got infinity; mark missing answers with NaN")
    return numbers, known


def free_label(classes: np.ndarray, wanted: Any, word: str) -> Any:
    """The mark of a row without an own answer: as wanted, else -1 (or one below the smallest class), or the word."""
    numeric = classes.dtype.kind in "biuf"
    if wanted is None and numeric:
        wanted = -1 if -1 not in classes else classes.min().item() - 1
    label = word if wanted is None else wanted
    # NumPy would convert the classes where text and numbers are in one array of answers.
    if classes.dtype.kind != "O" and np.asarray(label).dtype.kind not in ("biuf" if numeric else "U"):
        kind, free = ("a number", "a free number") if numeric else ("text", repr(word))
        raise ValueError(
            f"{word}_label: expected {kind} as among the classes {classes[:3].tolist()}, got {label!r}; pass None for {free}, "
            "or y of dtype object to mix kinds"
        )
    if label in classes.tolist():
        raise ValueError(f"{word}_label: {label!r} is a class; choose another one")
    return label


def _is_missing(answer: Any) -> bool:
    # NaN differs from itself.  pandas' NA compares as NA, which is no bool and raises when taken as one.
    differs = answer != answer
    return answer is None or not isinstance(differs, bool | np.bool_) or bool(differs)


def _table(answers: Any) -> tuple[np.ndarray, np.ndarray]:
    # NumPy would turn the NaN in a list of texts into the text "nan".
    values = np.asarray(answers) if hasattr(answers, "__array__") else np.asarray(answers, dtype=object)
    if hasattr(answers, "isna"):
        known = ~np.asarray(answers.isna())
    elif values.dtype.kind == "O":
        known = np.array([not _is_missing(answer) for answer in values.flat], dtype=bool).reshape(values.shape)
    else:
        known = np.full(values.shape, True) if values.dtype.kind != "f" else ~np.isnan(values)
    known &= ~np.ma.getmaskarray(answers) if isinstance(answers, np.ma.MaskedArray) else True
    if values.ndim not in (1, 2):
        raise ValueError(f"expert_answers: expected shape (N,) or (N, E), one column per expert, got {values.shape}")
    return (values[:, None], known[:, None]) if values.ndim == 1 else (values, known)
