"""In what way a cell was made, from the settings that it records: those of one table should agree in it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.harness.training import Recipe

__all__ = ["PRECISION", "differing", "way_of"]

PRECISION = ("bfloat16", "compiled")  # of a recipe: these are the machine's
_MEASURED = ("speed", "first_stage")
_USUAL = asdict(Recipe(epochs=0))


def way_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of the recipe beside the others; what a recipe did not have yet, or has as null, it did not do."""
    way = {key: value for key, value in settings.items() if key not in _MEASURED}
    if recipe := way.pop("recipe", None):
        way |= _USUAL | {key: value for key, value in recipe.items() if value is not None}
    # As it is read from a cell: tuples are lists there.
    return json.loads(json.dumps(way))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the settings in which two cells differ."""
    ways = way_of(one), way_of(other)
    return sorted(key for key in ways[0].keys() | ways[1].keys() if ways[0].get(key) != ways[1].get(key))
