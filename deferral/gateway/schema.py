"""The tables of the gateway.  Whoever changes them adds a step to `migrations`, and 1 to VERSION."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, func

__all__ = [
    "VERSION",
    "admissions",
    "alarms",
    "cascades",
    "decisions",
    "feedback",
    "forgotten",
    "grants",
    "keys",
    "looks",
    "minutes",
    "notices",
    "own_price",
    "reloads",
    "shadows",
    "tables",
    "texts",
    "version",
]

VERSION = 6

tables = MetaData()
decisions = Table(
    "decisions",
    tables,
    Column("id", String(64), primary_key=True),
    Column("reply_id", String(200), nullable=False),  # the id inside the upstream's reply
    Column("time", Float(53), nullable=False),
    Column("key", String(64), nullable=False),
    Column("requested", String(200), nullable=False),
    Column("expert", String(200), nullable=False),
    Column("chosen", String(200), nullable=False),
    Column("reason", Text, nullable=False),
    Column("propensity", Float(53)),
    Column("expected", Text, nullable=False),  # JSON: expert -> [quality, price, cost], cost null where it may not be asked
    Column("price_of_error", Float(53)),
    Column("best_price", Float(53)),
    Column("price", Float(53), nullable=False),
    Column("estimated", Boolean, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("first_byte_s", Float(53)),
    Column("latency_s", Float(53)),
    Column("status", Integer, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("fast_path", Boolean, nullable=False),
    Column("kind", String(24)),  # of query, as the router that decided knows them
    Column("draw", Float(53)),  # what the router explores by: the same for the same query
    Index("decisions_by_time", "time"),
    Index("decisions_by_key", "key", "time", "price"),
    Index("decisions_by_reply", "reply_id", "key"),
)
feedback = Table(
    "feedback",
    tables,
    Column("decision", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("quality", Float(53), nullable=False),
    Column("time", Float(53), nullable=False),
    Index("feedback_by_time", "time"),
)
texts = Table(
    "texts",
    tables,
    Column("decision", String(64), primary_key=True),
    Column("query", Text, nullable=False),
    Column("time", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
    Index("texts_by_expiry", "expires"),
    Index("texts_by_time", "time"),
)
# Requests that one expert answered first, by the log-probabilities of whose answer it was kept or another expert asked.
cascades = Table(
    "cascades",
    tables,
    Column("decision", String(64), primary_key=True),
    Column("first", String(200), nullable=False),
    Column("ending", String(20), nullable=False),
    Column("extra", Float(53), nullable=False),  # of the decision's price: what the first answer cost, where another was given
    Column("quality", Float(53)),  # expected of the first answer, once it was there
    Column("confidence", Text),  # JSON: the numbers of deferral.routing.Confidence, null where one is not known
)
keys = Table(
    "keys",
    tables,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("experts", Text),  # JSON: names; null is all
    Column("requests_per_minute", Integer),
    Column("budget", Float(53)),
    Column("window", String(20), nullable=False),
    Column("zone", String(64), nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("revoked", Float(53)),
    Column("former", String(64)),  # the hash of the token before, which is valid until then
    Column("former_until", Float(53)),
    Column("ends", Float(53)),
)
# How much of a key's budget each worker may spend in a window, and has spent; worker "" stands for those that have ended.
grants = Table(
    "grants",
    tables,
    Column("key", String(64), primary_key=True),
    Column("start", Float(53), primary_key=True),
    Column("worker", String(32), primary_key=True),
    Column("granted", Float(53), nullable=False),
    Column("spent", Float(53), nullable=False),
    Column("seen", Float(53), nullable=False),
)
# Requests that a worker may let through until a time, taken from a key's rate.
admissions = Table(
    "admissions",
    tables,
    Column("id", String(32), primary_key=True),
    Column("key", String(64), nullable=False),
    Column("until", Float(53), nullable=False),
    Column("count", Integer, nullable=False),
    Index("admissions_by_key", "key", "until"),
)
# What requests have cost whose rows were deleted, by quarters of an hour: a budget does not come back with them.
forgotten = Table(
    "forgotten",
    tables,
    Column("key", String(64), primary_key=True),
    Column("time", Float(53), primary_key=True),
    Column("price", Float(53), nullable=False),
)
# What happened in each minute, by who answered: a month of it is read in a moment, however many decisions there were.
minutes = Table(
    "minutes",
    tables,
    Column("minute", BigInteger, primary_key=True, autoincrement=False),  # since 1970
    Column("expert", String(200), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("routed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),
    Column("price", Float(53), nullable=False),
    Column("compared", BigInteger, nullable=False),  # routed answers whose price at the best expert is known
    Column("saved", Float(53), nullable=False),
    Column("saved_squared", Float(53), nullable=False),
    Column("timed", BigInteger, nullable=False),
    Column("latency", Float(53), nullable=False),
)
reloads = Table(
    "reloads",
    tables,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("count", BigInteger, nullable=False),
)
# What was seen when drift was last looked for, in the units of each alarm, and whether that rings.
alarms = Table(
    "alarms",
    tables,
    Column("name", String(20), primary_key=True),
    Column("expert", String(200), primary_key=True),  # "" is all of them
    Column("rows", BigInteger, nullable=False),
    Column("found", Float(53)),
    Column("low", Float(53)),
    Column("high", Float(53)),
    Column("ringing", Boolean, nullable=False),
    Column("since", Float(53), nullable=False),
)
looks = Table(
    "looks",
    tables,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("time", Float(53), nullable=False),
)
# What is still to be told of alarms.
notices = Table(
    "notices",
    tables,
    Column("id", String(32), primary_key=True),
    Column("time", Float(53), nullable=False),
    Column("body", Text, nullable=False),  # JSON, as it is sent
    Column("attempts", Integer, nullable=False),
    Column("due", Float(53), nullable=False),  # until then it failed lately, or somebody is at it
)
# What a candidate router would have decided.
shadows = Table(
    "shadows",
    tables,
    Column("decision", String(64), primary_key=True),
    Column("time", Float(53), nullable=False),
    Column("candidate", String(64), nullable=False),  # the fingerprint of its folder
    Column("chosen", String(200), nullable=False),
    Column("expected", Text, nullable=False),  # as in decisions
    Index("shadows_by_time", "time"),
)
version = Table("schema_version", tables, Column("version", Integer, primary_key=True, autoincrement=False))

# Of a decision joined with its cascade: what a first answer cost that was not given is no price of the one that was.
own_price = (decisions.c.price - func.coalesce(cascades.c.extra, 0.0)).label("price")
