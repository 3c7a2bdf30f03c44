"""Figures as JSON that every reader takes."""

import json
import math
from typing import Any

__all__ = ["as_json"]


def as_json(record: dict[str, Any]) -> str:
    """The text of a file.  NaN and infinity are no JSON: what is not a number becomes null."""
    return json.dumps(_without_nan(record), indent=1, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
