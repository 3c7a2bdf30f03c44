"""What an expert can do, and what a query needs: masks on the experts, applied before any score."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Abilities", "Needs", "able", "check_abilities"]


@dataclass(frozen=True)
class Abilities:
    """What an expert can do.  `context_tokens=None` is no limit; `region=None` is in none that `Needs` names."""

    context_tokens: int | None = None
    tools: bool = True
    images: bool = True
    region: str | None = None

    def __post_init__(self) -> None:
        if self.context_tokens is not None:
            _check_tokens("context_tokens", self.context_tokens, 1)
        _check_flags(tools=self.tools, images=self.images)
        if not isinstance(self.region, str | None):
            raise TypeError(f"region: expected a name or None, got {self.region!r}")


@dataclass(frozen=True)
class Needs:
    """What a query needs.  `regions=None` and `allow=None` are no restriction; `deny` is left out of what is allowed."""

    tokens: int = 0
    tools: bool = False
    images: bool = False
    regions: frozenset[str] | None = None
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_tokens("tokens", self.tokens, 0)
        _check_flags(tools=self.tools, images=self.images)
        for name in ("regions", "allow", "deny"):
            names = getattr(self, name)
            if names is None and name != "deny":
                continue
            if not isinstance(names, frozenset):
                raise TypeError(f"{name}: expected a frozenset, got {type(names).__name__}; use Needs.of(...)")
            if strange := [one for one in names if not isinstance(one, str)]:
                raise TypeError(f"{name}: expected names, got {strange[0]!r}")

    @classmethod
    def of(
        cls,
        *,
        tokens: int = 0,
        tools: bool = False,
        images: bool = False,
        regions: Collection[str] | None = None,
        allow: Collection[str] | None = None,
        deny: Collection[str] = (),
    ) -> "Needs":
        """Needs from any collections of names."""
        for name, names in (("regions", regions), ("allow", allow), ("deny", deny)):
            if isinstance(names, str):
                raise TypeError(f"{name}: expected a collection of names, got one text; put it in a list")
            if not isinstance(names, Iterable) and (names is not None or name == "deny"):
                raise TypeError(f"{name}: expected a collection of names, got {names!r}")
        return cls(
            tokens,
            tools,
            images,
            None if regions is None else frozenset(regions),
            None if allow is None else frozenset(allow),
            frozenset(deny),
        )


def able(experts: Sequence[str], abilities: Mapping[str, Abilities], needs: Needs) -> np.ndarray:
    """Which experts may be asked.  -> (E,) bool; ValueError, with the reason for each, where none may"""
    if unknown := sorted(((needs.allow or frozenset()) | needs.deny) - set(experts)):
        raise ValueError(f"allow, deny: {unknown[0]!r} is no expert of this router; it has {', '.join(experts)}")
    reasons = {name: _refused(name, abilities.get(name, Abilities()), needs) for name in experts}
    mask = np.array([reasons[name] is None for name in experts])
    if not mask.any():
        raise ValueError(f"no expert is left: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}")
    return mask


def _refused(name: str, can: Abilities, needs: Needs) -> str | None:
    if name in needs.deny or (needs.allow is not None and name not in needs.allow):
        return "not allowed"
    if can.context_tokens is not None and needs.tokens > can.context_tokens:
        return f"{needs.tokens} tokens exceed its window of {can.context_tokens}"
    if needs.tools and not can.tools:
        return "it takes no tools"
    if needs.images and not can.images:
        return "it takes no images"
    if needs.regions is not None and can.region not in needs.regions:
        return "its region is not known" if can.region is None else f"it is in {can.region}"
    return None


def check_abilities(name: str, abilities: Any) -> None:
    """TypeError where an expert's abilities are none."""
    if not isinstance(abilities, Abilities):
        raise TypeError(f"abilities of {name}: expected Abilities(...), got {abilities!r}")


def _check_tokens(name: str, tokens: Any, least: int) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer):
        raise TypeError(f"{name}: expected a whole number, got {tokens!r}")
    if tokens < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {tokens}")


def _check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
