"""decisions, feedback, texts and keys: the first version, which `prepare` makes"""

revision = "1"
down_revision = None


def upgrade() -> None:
    """Nothing comes before it."""
