"""The error of data that is not what it should be, apart from everything that reads data: it must cost nothing to name."""

__all__ = ["DataError"]


class DataError(ValueError):
    """Data that is missing, corrupted or not what its name says."""
