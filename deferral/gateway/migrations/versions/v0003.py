"""requests that one expert answered first: what became of that answer, and how sure the expert was of it"""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """A table that is new; a gateway of version 2 that still runs is not disturbed."""
    op.create_table(
        "cascades",
        sa.Column("decision", sa.String(64), primary_key=True),
        sa.Column("first", sa.String(200), nullable=False),
        sa.Column("ending", sa.String(20), nullable=False),
        sa.Column("extra", sa.Float(53), nullable=False),
        sa.Column("quality", sa.Float(53)),
        sa.Column("confidence", sa.Text),
    )
