"""what drifts, what a candidate router would have decided, and requests that one expert answered first"""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """New tables, and a column that may be null."""
    op.add_column("decisions", sa.Column("kind", sa.String(24)))
    op.create_table(
        "alarms",
        sa.Column("name", sa.String(20), primary_key=True),
        sa.Column("expert", sa.String(200), primary_key=True),
        sa.Column("rows", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.Float(53)) for name in ("found", "low", "high")),
        sa.Column("ringing", sa.Boolean, nullable=False),
        sa.Column("since", sa.Float(53), nullable=False),
    )
    op.create_table(
        "looks",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("time", sa.Float(53), nullable=False),
    )
    op.create_table(
        "shadows",
        sa.Column("decision", sa.String(64), primary_key=True),
        sa.Column("time", sa.Float(53), nullable=False),
        sa.Column("candidate", sa.String(64), nullable=False),
        sa.Column("chosen", sa.String(200), nullable=False),
        sa.Column("expected", sa.Text, nullable=False),
    )
    op.create_index("shadows_by_time", "shadows", ["time"])
    op.create_table(
        "cascades",
        sa.Column("decision", sa.String(64), primary_key=True),
        sa.Column("first", sa.String(200), nullable=False),
        sa.Column("ending", sa.String(20), nullable=False),
        sa.Column("extra", sa.Float(53), nullable=False),
        sa.Column("quality", sa.Float(53)),
        sa.Column("confidence", sa.Text),
    )
