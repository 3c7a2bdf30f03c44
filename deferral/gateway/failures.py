"""What it means when an expert gives nothing that a client could use: whose fault it is, and who may be asked again."""

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time

import aiohttp

from deferral.gateway.usage import error_of

__all__ = ["Failure", "check_error", "is_failure", "refused_with", "retry_after_of", "unanswered"]

_MISCONFIGURED = frozenset({401, 402, 403, 404, 405, 407})
_OVERLOADED = frozenset({408, 425, 429})
_LONGEST_WAIT = 86_400.0


class Failure(Exception):
    """An attempt that gave the client nothing.

    `again`: the same expert may be asked once more; `blame`: the breaker counts it; `rest`: seconds for which the expert wants
    to be left alone; `stale`: the connection had been closed while it was idle, it seems, and a new one is due; `of_server`: no
    request could have brought it about.  `status` and `code` are for the client, if nobody else answers, `came` is the status
    that refused the gateway.  The message never quotes the upstream, which may repeat a key.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        again: bool = False,
        blame: bool = True,
        rest: float | None = None,
        stale: bool = False,
        came: int | None = None,
        of_server: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.came = status, code, message, came
        self.again, self.blame, self.rest, self.stale, self.of_server = again, blame, rest, stale, of_server


def is_failure(status: int) -> bool:
    return status in _MISCONFIGURED or status >= 500 or status in _OVERLOADED or 300 <= status < 400 or status < 200


def check_error(beginning: bytes, path: str) -> None:
    """Failure where a reply that calls itself an answer is an error, and one that is not the client's own fault."""
    status = error_of(beginning)
    if status is not None and is_failure(status):
        raise refused_with(status, path, None)


def unanswered(error: Exception, *, reused: bool) -> Failure:
    """Nothing of a reply has come; `reused`: the connection was there before, and it ended at once."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return Failure(504, "upstream_timeout", "could not be reached in time", of_server=True)
    if isinstance(error, TimeoutError):
        return Failure(504, "upstream_timeout", "did not answer in time")
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return Failure(502, "upstream_unreachable", "cannot be reached: its proxy does not answer", again=True, of_server=True)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return Failure(
            502, "upstream_unreachable", f"cannot be reached: its proxy refuses with status {error.status}", of_server=True
        )
    if isinstance(error, aiohttp.InvalidURL):
        return Failure(502, "upstream_unreachable", "cannot be reached: the environment names a proxy by no URL", of_server=True)
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.ServerFingerprintMismatch):
        return Failure(502, "upstream_unreachable", "has no certificate that can be trusted", of_server=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure(502, "upstream_unreachable", "cannot be reached", again=True, of_server=True)
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError):
        return Failure(502, "upstream_bad_reply", "closed the connection before it answered", again=True, stale=reused)
    if "content-encoding" in str(error).lower():
        return Failure(502, "upstream_bad_reply", "compressed its reply, though it was asked not to, in a way that is not known")
    return Failure(502, "upstream_bad_reply", "answered something that is no HTTP")


def refused_with(status: int, path: str, retry_after: float | None) -> Failure:
    if path == "/responses" and status in (404, 405):
        return Failure(404, "not_found", f"has no /responses, or not what the request names (status {status})", blame=False)
    if status in _MISCONFIGURED:
        message = f"refused the gateway with status {status}; its key, model, address or proxy is wrong"
        # Many servers know no path but that of chats: who asks them for another must not open the breaker for those who chat.
        unknown_path = status in (404, 405) and path != "/chat/completions"
        return Failure(502, "upstream_misconfigured", message, blame=not unknown_path, came=status, of_server=status == 401)
    if status == 429:
        # Without a time, or with 0, it would be asked again at once, for ever.
        rest = retry_after or 1.0
        return Failure(429, "upstream_rate_limited", "asks for fewer requests", blame=False, rest=rest)
    if status >= 500 or status in _OVERLOADED:
        return Failure(502, "upstream_error", f"failed with status {status}", again=not retry_after, rest=retry_after)
    return Failure(502, "upstream_bad_reply", f"answered with status {status}")


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by Retry-After, a number or a date; more exact where OpenAI's `retry-after-ms` is there as well."""
    milliseconds, text = headers.get("retry-after-ms", ""), headers.get("Retry-After", "")
    try:
        if milliseconds.replace(".", "", 1).isdigit():
            return min(float(milliseconds) / 1000, _LONGEST_WAIT)
        if text.replace(".", "", 1).isdigit():
            return min(float(text), _LONGEST_WAIT)
        if not text:
            return None
        return min(max(parsedate_to_datetime(text).timestamp() - time(), 0.0), _LONGEST_WAIT)
    except (ValueError, OverflowError):
        return None
