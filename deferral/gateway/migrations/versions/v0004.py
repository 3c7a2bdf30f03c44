"""what is still to be told of alarms; the token that a key had before, and until when it is valid"""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    """A table that is new, and columns that may be null; a gateway of version 3 that still runs knows the new token alone."""
    op.create_table(
        "notices",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", sa.Float(53), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due", sa.Float(53), nullable=False),
    )
    op.add_column("keys", sa.Column("former", sa.String(64)))
    op.add_column("keys", sa.Column("former_until", sa.Float(53)))
