"""Names that clients may use for a model: of an expert, or of the router at settings of its own.

Many clients can set the name of a model and no header.  The tables [aliases.NAME] stand in the experts file.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deferral.errors import DataError
from deferral.gateway.experts_file import AUTO, Expert, experts_in, name_fault, place_in, tables
from deferral.gateway.numbers import is_number
from deferral.gateway.requests import NO_HINTS, SETTING, TRADE_OFFS, Asked, Hints

__all__ = ["Alias", "aliases_in", "applied", "read_experts_file"]

_FIELDS = ("expert", "experts", *SETTING, "regions")


@dataclass(frozen=True, slots=True)
class Alias:
    """Either the name of an `expert`, or the router with `hints`, which hold among whom it chooses as well."""

    name: str
    expert: str = ""
    hints: Hints = NO_HINTS

    @property
    def routed(self) -> bool:
        return not self.expert

    def serves(self, experts: Collection[str], routed: Collection[str]) -> bool:
        """Whether it leads to some of these experts, of whom the router chooses among the `routed`."""
        if not self.routed:
            return self.expert in experts
        return any(self.hints.experts is None or name in self.hints.experts for name in routed)


def read_experts_file(path: str | Path) -> tuple[dict[str, Expert], dict[str, Alias]]:
    """All that an experts file holds; DataError names the line."""
    path = Path(path)
    # Read once: in between, the file may be replaced by another.
    text, found = tables(path)
    experts = experts_in(path, text, found)
    return experts, aliases_in(path, text, found, experts)


def aliases_in(path: Path, text: str, found: Mapping[str, Any], experts: Mapping[str, Expert]) -> dict[str, Alias]:
    """The aliases of an experts file whose `tables` are read already, {} where there are none; DataError names the line."""
    given = found.get("aliases", {})
    if not isinstance(given, dict):
        raise DataError(f"{place_in(path, text, 'aliases')}: expected tables [aliases.NAME], got {type(given).__name__}")
    result = {}
    for name, table in given.items():
        fault = _fault(name, table, experts)
        if fault:
            raise DataError(f"{place_in(path, text, fault.partition(':')[0], name, section='aliases')}: alias {name!r}, {fault}")
        result[name] = _alias(name, table)
    return result


def applied(alias: Alias, asked: Asked, hints: Hints) -> tuple[Asked, Hints]:
    """The request that is meant.  What its headers say goes before what the alias says."""
    if not alias.routed:
        return asked._replace(model=alias.expert), hints
    own = alias.hints
    values: dict[str, Any] = {"experts": own.experts}
    if all(getattr(hints, name) is None for name in TRADE_OFFS):
        values |= {name: getattr(own, name) for name in TRADE_OFFS}
    values |= {name: getattr(own, name) for name in ("max_latency", "regions") if getattr(hints, name) is None}
    return asked._replace(model="auto"), replace(hints, **values)


def _alias(name: str, table: Mapping[str, Any]) -> Alias:
    if "expert" in table:
        return Alias(name, table["expert"])
    values: dict[str, Any] = {key: float(table[key]) for key in SETTING if key in table}
    values |= {key: frozenset(table[key]) for key in ("experts", "regions") if key in table}
    return Alias(name, "", Hints(**values))


def _fault(name: str, table: Any, experts: Mapping[str, Expert]) -> str:
    """What is wrong with a table, "" where nothing is."""
    if not isinstance(table, dict):
        return f"expected a table [aliases.{name}], got {type(table).__name__}"
    if fault := name_fault(name):
        return fault
    if name in AUTO or name in experts:
        return "it is the name of an expert already" if name in experts else "it asks the router already"
    if unknown := [key for key in table if key not in _FIELDS]:
        return f"{unknown[0]}: unknown; expected some of {', '.join(_FIELDS)}"
    if not table:
        return f"it says nothing; expected one of {', '.join(_FIELDS)}"
    if "expert" in table:
        if len(table) > 1:
            return "expert: expected nothing beside it; an expert is asked as it is"
        if not isinstance(table["expert"], str):
            return f"expert: expected one name, got {table['expert']!r}; experts are those among whom the router chooses"
        return "" if table["expert"] in experts else f"expert: {_none_of(table['expert'], experts)}"
    return _setting_fault(table) or _choice_fault(table, experts)


def _setting_fault(table: Mapping[str, Any]) -> str:
    for key in (key for key in SETTING if key in table):
        value = table[key]
        if key == "min_quality":
            if not is_number(value) or not 0 <= value <= 1:
                return f"{key}: expected a number from 0 to 1, got {value!r}"
        elif not is_number(value) or value <= 0:
            return f"{key}: expected a number above 0, got {value!r}"
    several = [key for key in TRADE_OFFS if key in table]
    return f"{several[1]}: expected one trade-off, got {several[0]} as well" if len(several) > 1 else ""


def _choice_fault(table: Mapping[str, Any], experts: Mapping[str, Expert]) -> str:
    for key in (key for key in ("experts", "regions") if key in table):
        value = table[key]
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            return f"{key}: expected a list of names, got {value!r}"
    for one in table.get("experts", ()):
        if one not in experts:
            return f"experts: {_none_of(one, experts)}"
        if not experts[one].route:
            return f"experts: {one!r} has route = false, so that the router does not choose it"
    return ""


def _none_of(name: Any, experts: Mapping[str, Expert]) -> str:
    return f"{name!r} is no expert of this file; it has {', '.join(experts)}"
