"""The error of data that cannot be used as it is."""

__all__ = ["DataError"]


class DataError(ValueError):
    """Data that is missing, corrupted or not what its name says."""
