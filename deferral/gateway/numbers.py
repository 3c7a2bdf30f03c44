"""What counts as a number in what others have written: True and False, which Python takes for 1 and 0, do not."""

import sys
from typing import Any, TypeGuard

__all__ = ["is_number", "is_whole"]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite number.  A whole number that is larger than any float is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
