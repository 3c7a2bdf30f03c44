"""What errors all over the package have in common."""

__all__ = ["DataError", "installing"]


class DataError(ValueError):
    """Data that is missing, corrupted or not what its name says."""


def installing(extra: str) -> str:
    """How to install an extra, for messages.  By its bare name a package index would give another project."""
    return f"pip install '.[{extra}]' in a clone of deferral"
