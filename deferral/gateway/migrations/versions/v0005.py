"""the number that a decision was drawn by"""

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    """A column that may be null: of decisions before it nobody knows which were of the same query."""
    op.add_column("decisions", sa.Column("draw", sa.Float(53)))
