"""One attempt: a request goes to an expert, and a reply comes back whole, or begins, or it is a failure of a known kind."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

import aiohttp
from yarl import URL

from deferral.gateway.connecting import connected, opened, proxy_of, session
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure, check_error, is_failure, refused_with, retry_after_of, unanswered
from deferral.gateway.masking import MaskedStream, masked
from deferral.gateway.requests import Asked
from deferral.gateway.usage import Usage, usage_of

__all__ = ["FORWARDED", "Reply", "Upstream"]

# Headers of a request that go on to the expert: the others, cookies and the client's own key above all, stay here.
FORWARDED = frozenset({b"openai-beta", b"idempotency-key", b"user-agent", b"x-request-id", b"traceparent", b"tracestate"})
# Headers of a reply that stay here: what belongs to one connection, to its exact length, or to the account at the expert.
_OWN = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"trailers",
        b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server", b"set-cookie", b"alt-svc",
        b"strict-transport-security", b"openai-organization", b"openai-project", b"www-authenticate",
    }
)  # fmt: skip
# Servers close idle connections; uvicorn, which many of them are built on, after 5 seconds.
_KEEP_ALIVE = 4.0
# Codings that aiohttp undoes before anybody looks at a reply.
_DECODED = frozenset({b"identity", b"gzip", b"deflate", b"br", b"zstd"})
# A connection that was closed while it was idle is found to be so by the first answer of the other end's machine.
_STALE_S = 1.0
_SAYS = re.compile(rb"(?:^|[\r\n])data:[^\r\n]*[\r\n]")
_ANY_DATA = re.compile(rb"(?:^|[\r\n])data:")
_HELD_BACK_S = 1.0
_LONGEST_EVENT = 1 << 16
# A part of a stream that is as large is followed by others that are there already: then it is the turn of other requests.
_LARGE_PART = 1 << 16
# What the value of a header may hold that is sent on; the parser of replies lets more through.
_FIT = re.compile(rb"[\t -~\x80-\xff]*")


@dataclass(slots=True)
class Reply:
    """What an expert answered.  `body` is whole, or, if `response` is there, only the beginning of a stream."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    usage: Usage  # of a whole body
    response: aiohttp.ClientResponse | None = None
    mask: MaskedStream | None = None
    left: float = math.inf  # seconds that the expert has for the rest of a stream

    @property
    def streamed(self) -> bool:
        return self.response is not None

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows the first bytes of a stream; Failure where it breaks off, or its expert has taken too long.

        Only the time in which the expert is waited for counts, and not what the client takes to read.
        """
        assert self.response is not None
        assert self.mask is not None
        read, masked_part, left = self.response.content.readany, self.mask.part, self.left
        try:
            while True:
                asked = monotonic()
                chunk = await read()
                left -= monotonic() - asked
                if not chunk:
                    break
                if left < 0:
                    raise TimeoutError
                if len(chunk) >= _LARGE_PART:
                    # A kilobyte may unpack to a megabyte, and neither reading nor sending on would ever wait.
                    await asyncio.sleep(0)
                yield masked_part(chunk)
            if self.mask.held:
                yield self.mask.held
        except TimeoutError as error:
            raise Failure(504, "upstream_timeout", "stopped in the middle of the stream") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Failure(502, "upstream_bad_reply", "broke off in the middle of the stream") from error

    def close(self) -> None:
        """End it; a stream that is not over ends at the upstream as well."""
        if self.response is not None:
            self.response.close()


class Upstream:
    """The connections to all experts: one session for the life of the app.  To be made in its event loop."""

    def __init__(self, *, max_reply_bytes: int) -> None:
        self._most = max_reply_bytes
        self._session = session(keepalive_timeout=_KEEP_ALIVE)
        # Never a connection that was there before.
        self._fresh = session(force_close=True)
        self._prepared: dict[tuple[str, str, str], _Prepared] = {}

    def forget_all_but(self, servers: Collection[Expert]) -> None:
        """Whoever is gone leaves no key behind."""
        stay = {(server.name, server.base_url) for server in servers}
        self._prepared = {of: each for of, each in self._prepared.items() if of[:2] in stay}

    async def close(self) -> None:
        await self._session.close()
        await self._fresh.close()

    async def ask(
        self,
        expert: Expert,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        asked: Asked,
        *,
        fresh: bool = False,
        on_connected: Callable[[], None] = lambda: None,
    ) -> Reply:
        """One attempt at its `base_url`, by a new connection if `fresh`; Failure if it gave nothing that a client could use."""
        prepared = self._prepared.get((expert.name, expert.base_url, path))
        if prepared is None or prepared.expert is not expert:
            prepared = self._prepared[expert.name, expert.base_url, path] = _prepared(expert, path)
        sent = {**headers, **prepared.headers} if headers else prepared.headers
        began = monotonic()
        opened.set(False)
        connected.set(on_connected)
        try:
            # aiohttp's own limit would hold for a stream as well, and go on while a client does not read.
            async with asyncio.timeout(expert.total_s):
                try:
                    # A redirect would take the key to another place.
                    response = await (self._fresh if fresh else self._session).post(
                        prepared.url,
                        data=body,
                        headers=sent,
                        timeout=prepared.timeout,
                        allow_redirects=False,
                        proxy=prepared.proxy,
                    )
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    reused = not opened.get() and monotonic() - began < _STALE_S
                    raise unanswered(error, reused=reused) from error
                try:
                    reply = await self._reply(response, asked, path, prepared.secret)
                except BaseException:
                    response.close()
                    raise
        except TimeoutError as error:
            raise Failure(504, "upstream_timeout", "did not answer in time") from error
        reply.left = expert.total_s - (monotonic() - began)
        return reply

    async def look(self, expert: Expert, path: str, timeout_s: float) -> tuple[int, bytes]:
        """GET a path, by a new connection.  -> status and body, whatever they are; Failure where none came"""
        prepared = _prepared(expert, path)
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=expert.connect_s)
        try:
            async with self._fresh.get(
                prepared.url, headers=prepared.headers, timeout=timeout, allow_redirects=False, proxy=prepared.proxy
            ) as reply:
                return reply.status, await self._whole(reply)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise unanswered(error, reused=False) from error

    async def _reply(self, response: aiohttp.ClientResponse, asked: Asked, path: str, secret: bytes) -> Reply:
        status = response.status
        if is_failure(status):
            raise refused_with(status, path, retry_after_of(response.headers))
        named_kind = response.headers.get("Content-Type", "")
        kind = named_kind.lower()
        events = kind.startswith("text/event-stream")
        if status < 300 and not (kind.startswith("application/json") or (events and asked.stream)):
            raise Failure(
                502, "upstream_bad_reply", f"answered neither JSON nor a stream that was asked for: {_shown(named_kind, secret)}"
            )
        headers = [(name.lower(), value) for name, value in response.raw_headers if _handed_on(name.lower(), value)]
        if named := response.headers.getall("Connection", None):
            # What it names is for this connection, too (RFC 9110, section 7.6.1).
            of_connection = {name.strip().lower().encode(errors="surrogateescape") for name in ",".join(named).split(",")}
            headers = [(name, value) for name, value in headers if name not in of_connection]
        if secret and secret in b"\n".join([value for _, value in headers]):
            headers = [(name, masked(secret, value)) for name, value in headers]
        unknown = Usage(asked.tokens, 0, True, "")
        try:
            if events and status < 300:
                first = await _beginning(response.content)
                if not first:
                    raise Failure(502, "upstream_bad_reply", "ended its stream before the first byte", again=True)
                check_error(first, path)
                mask = MaskedStream(secret)
                return Reply(status, headers, mask.part(first), unknown, response, mask)
            body = await self._whole(response)
        except TimeoutError as error:
            raise Failure(504, "upstream_timeout", "did not go on with its reply in time") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Failure(502, "upstream_bad_reply", "broke off its reply") from error
        body = masked(secret, body)
        coding = response.headers.get("Content-Encoding", "identity").lower().encode(errors="surrogateescape")
        if status >= 300 or coding not in _DECODED:
            return Reply(status, headers, body, unknown)
        usage = usage_of(body, asked.tokens, echoes=path == "/responses")
        if usage is None:
            raise Failure(502, "upstream_bad_reply", "answered with JSON that cannot be read")
        check_error(body, path)
        return Reply(status, headers, body, usage)

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        read = response.content.readany
        parts, size = [], 0
        while part := await read():
            size += len(part)
            if size > self._most:
                raise Failure(502, "upstream_bad_reply", f"answered more than {self._most} bytes")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What all requests to one path of an expert have in common."""

    expert: Expert
    url: URL
    headers: dict[str, str]
    timeout: aiohttp.ClientTimeout
    secret: bytes  # the key
    proxy: str | None


def _prepared(expert: Expert, path: str) -> _Prepared:
    # To be compressed for this hop is not worth the time; who does so anyway is understood.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if expert.key is not None:
        headers[expert.key_header] = f"Bearer {expert.key}" if expert.key_header == "authorization" else expert.key
    timeout = aiohttp.ClientTimeout(connect=expert.connect_s, sock_read=expert.first_byte_s)
    url = URL(f"{expert.base_url}{path}{'?' if expert.query else ''}{expert.query}")
    return _Prepared(expert, url, headers, timeout, (expert.key or "").encode(), proxy_of(url))


def _handed_on(name: bytes, value: bytes) -> bool:
    if name == b"content-encoding" and value.lower() in _DECODED:
        return False
    return name not in _OWN and not name.startswith(b"x-deferral-") and _FIT.fullmatch(value) is not None


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    """The first bytes of a stream, as far as its first event: what comes before it is no answer, and an error may follow.

    Comments alone, which a server sends while it works, are held back for a moment and no longer: they keep connections open.
    """
    first = await content.readany()
    if first and not _SAYS.search(first):
        with suppress(TimeoutError):
            async with asyncio.timeout(_HELD_BACK_S):
                while len(first) < _LONGEST_EVENT and not _SAYS.search(first):
                    if not (part := await content.readany()):
                        # Comments are no answer.
                        return first if _ANY_DATA.search(first) else b""
                    first += part
    return first


def _shown(kind: str, secret: bytes) -> str:
    shown = masked(secret, kind.encode(errors="surrogateescape")).decode(errors="replace")
    return repr(shown[:60].lower()) if kind else "no content type"
