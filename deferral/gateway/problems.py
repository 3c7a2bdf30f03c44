"""What a client is told when something is wrong: the body that OpenAI's clients understand."""

import json
import math
from collections.abc import Mapping

__all__ = ["Problem", "error_body", "number"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):
    """A request that ends with an error.  `retry_after` in seconds, `attempts` to have it answered were made."""

    attempts = 0

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            # HTTP counts whole seconds, and a client that comes back early is refused again.
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))

    @property
    def body(self) -> bytes:
        """JSON."""
        return error_body(self.status, self.code, self.message, self.param)


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """{"error": {"message", "type", "param", "code"}}"""
    kind = "insufficient_quota" if code == "insufficient_quota" else _TYPES.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "upstream_error" if status in (502, 504) else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def number(text: str) -> float:
    """The number that a client has written; NaN where it is none, as 1_0 and ١٠ are, which Python reads."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan
