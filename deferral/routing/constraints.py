"""What an expert can do, and what a query needs: masks on the experts, applied before any score."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Abilities", "Needs", "able"]


@dataclass(frozen=True)
class Abilities:
    """What an expert can do.  `context_tokens=None` is no limit; `region=None` is in none that `Needs` names."""

    context_tokens: int | None = None
    tools: bool = True
    images: bool = True
    region: str | None = None


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
        for name in ("regions", "allow", "deny"):
            if not isinstance(getattr(self, name), frozenset | None):
                raise TypeError(f"{name}: expected a frozenset, got {type(getattr(self, name)).__name__}; use Needs.of(...)")

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
        if isinstance(allow, str) or isinstance(deny, str) or isinstance(regions, str):
            raise TypeError("allow, deny, regions: expected a collection of names, got one text; put it in a list")
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
