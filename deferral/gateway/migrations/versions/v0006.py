"""keys that end"""

import sqlalchemy as sa
from alembic import op

revision = "6"
down_revision = "5"


def upgrade() -> None:
    """A column that may be null: keys before it have no end."""
    op.add_column("keys", sa.Column("ends", sa.Float(53)))
