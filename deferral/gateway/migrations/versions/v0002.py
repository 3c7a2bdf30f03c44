"""what several workers share: grants, admissions, reloads; and the price of what was deleted"""

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
