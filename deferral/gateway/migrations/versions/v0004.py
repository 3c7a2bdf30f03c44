"""the token that a key had before, and until when it is valid"""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    """Columns that may be null; a gateway of version 3 that still runs knows the new token alone."""
    op.add_column("keys", sa.Column("former", sa.String(64)))
    op.add_column("keys", sa.Column("former_until", sa.Float(53)))
