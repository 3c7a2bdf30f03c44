"""What is written in one transaction: decisions with all that belongs to them, and feedback on any that are there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, Select, select

from deferral.gateway.database import durable
from deferral.gateway.dialects import insert_rows, replacing, writing
from deferral.gateway.minutes import add_to_minutes
from deferral.gateway.rows import DecisionRow, cascade_values, id_kept, plain, values
from deferral.gateway.schema import cascades, decisions, feedback, texts

__all__ = ["Feedback", "write_batch"]


@dataclass(frozen=True, slots=True)
class Feedback:
    """How good a response was; `answer` is told whether there is such a response, once it is committed."""

    id: str
    quality: float
    key: str
    time: float
    answer: Callable[[bool], None]


def write_batch(
    engine: Engine, batch: Sequence[DecisionRow | Feedback], *, text_days: float | None
) -> list[tuple[Feedback, bool]]:
    """Commit it, the texts for so many days; None: without them.  -> the feedback, and whether its decision was there"""
    rows = [item for item in batch if isinstance(item, DecisionRow)]
    said = [item for item in batch if isinstance(item, Feedback)]
    with engine.connect() as connection:
        durable(connection, bool(said))
        with writing(connection):
            plain_rows = [values(row) for row in rows]
            insert_rows(connection, decisions, plain_rows)
            firsts = [cascade_values(row) for row in rows if row.cascade is not None]
            insert_rows(connection, cascades, firsts)
            add_to_minutes(connection, plain_rows, firsts)
            if text_days is not None:
                insert_rows(connection, texts, list(_texts(rows, text_days)))
            return _kept(connection, said) if said else []


def _texts(rows: Sequence[DecisionRow], days: float) -> Iterator[tuple]:
    for row in rows:
        if row.query is not None:
            yield row.id, plain(row.query), row.time, row.time + 86400 * days


def _kept(connection: Connection, said: Sequence[Feedback]) -> list[tuple[Feedback, bool]]:
    """Write feedback whose decision is there.  -> each, and whether it was"""
    columns = _held(select(decisions.c.id, decisions.c.key))
    by_id = {row.id: row.key for row in connection.execute(columns.where(decisions.c.id.in_({item.id for item in said})))}
    answers, kept = [], {}
    for item in said:
        found = _meant(connection, item, by_id)
        # An upstream that gives the same id to several replies leaves open which is meant.
        if known := len(found) == 1:
            kept[found[0], item.key] = item
        answers.append((item, known))
    if kept:
        # In one order everywhere: two workers that wait for each other's rows would wait for ever.
        ordered = sorted(kept.items())
        rows = [{"decision": one, "key": by, "quality": item.quality, "time": item.time} for (one, by), item in ordered]
        connection.execute(replacing(connection, feedback), rows)
    return answers


def _meant(connection: Connection, item: Feedback, by_id: Mapping[str, str]) -> Sequence[str]:
    """Decisions of this id, else those whose reply had it; no more than two, which leave open which is meant, are looked for."""
    if item.id in by_id:
        return [item.id] if item.key in ("", by_id[item.id]) else []
    if not item.id:
        return []
    same = decisions.c.reply_id == id_kept(item.id)
    if item.key:
        same &= decisions.c.key == item.key
    return connection.execute(_held(select(decisions.c.id).where(same).limit(2))).scalars().all()


def _held(wanted: Select) -> Select:
    """Not to be deleted before the commit, and without those that are being deleted: feedback on them would stay for ever."""
    # Skipped, not waited for: whoever deletes locks many in no order, and the two could wait for each other.
    return wanted.with_for_update(read=True, key_share=True, skip_locked=True)
