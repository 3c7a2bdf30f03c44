"""what several workers share: grants, admissions, reloads; the price of what was deleted; sums by the minute"""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Tables that are new; a gateway of version 1 that still runs is not disturbed."""
    op.create_table(
        "grants",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("start", sa.Float(53), primary_key=True),
        sa.Column("worker", sa.String(32), primary_key=True),
        sa.Column("granted", sa.Float(53), nullable=False),
        sa.Column("spent", sa.Float(53), nullable=False),
        sa.Column("seen", sa.Float(53), nullable=False),
    )
    op.create_table(
        "admissions",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("until", sa.Float(53), nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
    )
    op.create_index("admissions_by_key", "admissions", ["key", "until"])
    op.create_table(
        "forgotten",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("time", sa.Float(53), primary_key=True),
        sa.Column("price", sa.Float(53), nullable=False),
    )
    op.create_table(
        "reloads",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "minutes",
        sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("expert", sa.String(200), primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("requests", "routed", "failed", "estimated")),
        sa.Column("price", sa.Float(53), nullable=False),
        sa.Column("compared", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.Float(53), nullable=False) for name in ("saved", "saved_squared")),
        sa.Column("timed", sa.BigInteger, nullable=False),
        sa.Column("latency", sa.Float(53), nullable=False),
    )
    # A cast cuts off on SQLite and rounds on PostgreSQL.
    whole = "FLOOR(time / 60)" if op.get_bind().dialect.name == "postgresql" else "time / 60"
    compared = "requested = 'auto' AND outcome = 'ok' AND best_price IS NOT NULL"
    op.execute(
        "INSERT INTO minutes (minute, expert, requests, routed, failed, estimated, price, compared, saved, saved_squared, timed, "
        f"latency) SELECT CAST({whole} AS BIGINT), expert, COUNT(*), SUM(CASE WHEN requested = 'auto' THEN 1 ELSE 0 END), "
        "SUM(CASE WHEN outcome IN ('error', 'truncated') THEN 1 ELSE 0 END), "
        "SUM(CASE WHEN estimated AND expert <> '' THEN 1 ELSE 0 END), SUM(price), "
        f"SUM(CASE WHEN {compared} THEN 1 ELSE 0 END), SUM(CASE WHEN {compared} THEN best_price - price ELSE 0 END), "
        f"SUM(CASE WHEN {compared} THEN (best_price - price) * (best_price - price) ELSE 0 END), "
        f"COUNT(latency_s), COALESCE(SUM(latency_s), 0) FROM decisions GROUP BY CAST({whole} AS BIGINT), expert"
    )
