"""The record: every decision and what became of it, and the feedback on it."""

from dataclasses import dataclass
from math import nan

__all__ = ["DecisionRow", "Record"]


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """One request: who was chosen and why, who answered, and what it cost."""

    id: str
    time: float
    key: str
    requested: str
    expert: str
    chosen: str
    reason: str
    propensity: float
    expected_quality: dict[str, float]
    expected_price: dict[str, float]
    expected_cost: dict[str, float]
    price_of_error: float
    price: float
    estimated: bool
    input_tokens: int
    output_tokens: int
    first_byte_s: float
    latency_s: float
    status: int
    outcome: str
    attempts: int
    streamed: bool
    fast_path: bool
    query: str | None
    reply_id: str = ""
    best_price: float = nan


class Record:
    """Writes decisions and feedback from one thread, in batches."""

    def __init__(self, url: str, *, store_text: bool = False, retention_days: float | None = None) -> None: ...

    def start(self) -> None: ...

    async def close(self) -> None: ...

    def add(self, row: DecisionRow) -> None: ...

    async def feedback(self, response_id: str, quality: float, *, source_key: str) -> bool: ...

    def spent(self, key: str, since: float) -> float: ...

    @property
    def full(self) -> bool: ...

    @property
    def trouble(self) -> str: ...
