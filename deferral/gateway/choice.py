"""A choice of whom to ask, and what is set aside for it."""

import math
from typing import NamedTuple

from deferral.gateway.experts_file import Expert
from deferral.gateway.requests import Asked

__all__ = ["Choice", "set_aside"]


class Choice(NamedTuple):
    """Whom to ask, and after whose failure whom: `ranking` begins with the chosen one and goes on by expected cost.

    quality, price and cost (in errors) of every expert that might be asked; propensity of the chosen one; `best` is the expert
    of the highest mean quality, "" where the router was not asked; `kind` is that of the query, as the router knows them.
    `draw` is the number that exploration drew by: of whoever has the same one, the choices are one draw.
    """

    ranking: tuple[str, ...]
    reason: str
    propensity: float
    quality: dict[str, float]
    price: dict[str, float]
    cost: dict[str, float]
    price_of_error: float
    best: str
    fast_path: bool
    kind: str = ""
    draw: float = math.nan


def set_aside(expert: Expert, choice: Choice, asked: Asked) -> float:
    """Dollars to be kept for what this expert is asked: what the choice expects, and at least the price of what is sent.

    What is expected of a router goes by the query, and is of one answer; a long conversation or system prompt costs more.
    """
    answers = 1 if asked.model == expert.name else asked.answers
    return max(answers * choice.price[expert.name], expert.price(asked.tokens, 0))
