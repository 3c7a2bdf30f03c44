"""Labels that are written in another way than those of the data: every such answer would count as wrong."""

from collections.abc import Iterable

__all__ = ["FEW_ANSWERS", "misspelt"]

# Where as many answers as this hold no class of the data, they are spelt in another way; fewer may all be wrong by chance.
FEW_ANSWERS = 10


def misspelt(given: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The given labels that are a known one but for blanks or case, and which; none where that tells known ones apart."""
    right = set(known)
    spelt = {_folded(label): label for label in right}
    if len(spelt) < len(right):
        return {}
    return {label: spelt[_folded(label)] for label in sorted(set(given) - right) if _folded(label) in spelt}


def _folded(label: str) -> str:
    return label.strip().casefold()
