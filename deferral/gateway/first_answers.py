"""What became of the answers that one expert gave first."""

from dataclasses import dataclass

from sqlalchemy import Engine, func, select

from deferral.gateway.schema import cascades, decisions

__all__ = ["First", "FirstAnswers", "first_answers"]

_ROWS = 20_000


@dataclass(frozen=True)
class First:
    """Of one expert that was asked first: how often, how that ended (as in `CascadeRow`), and dollars of answers not given."""

    first: str
    requests: int
    endings: dict[str, int]
    extra: float


@dataclass(frozen=True)
class FirstAnswers:
    """Among the newest `looked` requests; whoever was asked first most often comes first."""

    looked: int
    experts: list[First]


def first_answers(engine: Engine, *, since: float, until: float) -> FirstAnswers:
    """Of requests since <= time < until, in seconds since 1970: at most the newest 20,000, found by their index."""
    d, c = decisions.c, cascades.c
    newest = select(d.id).where(d.time >= since, d.time < until).order_by(d.time.desc()).limit(_ROWS).subquery()
    with engine.connect() as connection:
        looked = connection.execute(select(func.count()).select_from(newest)).scalar_one()
        rows = connection.execute(
            select(c.first, c.ending, func.count(), func.sum(c.extra))
            .join(newest, newest.c.id == c.decision)
            .group_by(c.first, c.ending)
            .order_by(c.first, c.ending)
        ).all()
    endings: dict[str, dict[str, int]] = {}
    extra: dict[str, float] = {}
    for first, ending, count, dollars in rows:
        endings.setdefault(first, {})[ending] = count
        extra[first] = extra.get(first, 0.0) + float(dollars)
    found = [First(name, sum(each.values()), each, extra[name]) for name, each in endings.items()]
    return FirstAnswers(looked, sorted(found, key=lambda one: -one.requests))
