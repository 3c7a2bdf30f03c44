"""How the servers of an expert are doing, and which of them is asked next."""

import logging
from collections.abc import Collection, Sequence
from hashlib import blake2b
from time import monotonic
from typing import NamedTuple

from deferral.gateway.breaker import Breaker
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.slots import Full, Slots

__all__ = ["UNASKED", "Servers", "Standing", "Talk"]

_log = logging.getLogger("deferral.gateway")

_TOLD_ONCE_IN = 30.0
# Failures of a request that never left.
UNASKED = frozenset({"experts_down", "experts_busy", "queue_full"})
# From the best to the worst.
_STATES = ("closed", "half-open", "resting", "open")
# A prompt cache is worth some waiting: so many times as many requests as the server with the fewest, and so many more.
_BUSIER_TIMES, _BUSIER_BY = 1.25, 2


class Talk(NamedTuple):
    """How the conversation of a request begins, or what it is called, and whether somebody has answered in it before."""

    name: str
    begun: bool


class Standing:
    """How one server of an expert is doing: its breaker, its slots and its queue."""

    def __init__(self, server: Expert) -> None:
        self.server = server
        self._mark = blake2b("\n".join(_place(server)).encode(), digest_size=16).digest()
        self.breaker = Breaker()
        self.slots = Slots(server.max_concurrent, server.max_waiting)
        # Of the other servers of its expert.
        self.beside: Sequence[Slots] = ()
        # Until when failures of each code are told no more.
        self._told: dict[str, float] = {}

    def update(self, server: Expert) -> None:
        """The server as another experts file has it; what is under way goes on."""
        if _access(server) != _access(self.server):
            # What it refused was the key of before.
            self.breaker.begin_anew()
        self.slots.resize(server.max_concurrent, server.max_waiting)
        self.server = server

    @property
    def load(self) -> int:
        """Requests under way and waiting."""
        return self.slots.taken + self.slots.queued

    @property
    def free(self) -> bool:
        """Whether a request has a slot without waiting."""
        return self.load < self.slots.limit

    @property
    def due(self) -> bool:
        """Whether one request is to show that it is back, and can do so now."""
        return self.breaker.state == "half-open" and self.free

    def affinity(self, talk: Talk) -> bytes:
        """The largest at the server where a conversation belongs, the same in every process (rendezvous hashing)."""
        return blake2b(talk.name.encode("utf-8", "surrogatepass"), digest_size=8, key=self._mark).digest()

    def enter(self, key: str) -> int:
        """A ticket of the breaker, for a request of a key that has a slot; Failure, and no slot, where there is none."""
        ticket = self.breaker.enter()
        if ticket is None:
            self.slots.leave(key)
            if self.breaker.busy:
                raise Failure(429, "experts_busy", "asks for fewer requests", blame=False, rest=self.breaker.wait)
            raise Failure(503, "experts_down", "is down", blame=False, rest=self.breaker.wait)
        return ticket

    def give_back(self, seconds: float, key: str) -> None:
        """A slot that was held for so long by a request of a key: who waits here has it, or else who waits at another server."""
        self.slots.give_back(seconds, key)
        self.let_in()

    def let_in(self) -> None:
        """Who waits at another server has the slots that are free here."""
        # To show that this one is back a single request will do, and a new one has time left for another.
        while self.breaker.state == "closed" and not self.breaker.down and self.slots.let_in(self.beside):
            pass

    def begun(self, ticket: int) -> int:
        """A reply has begun that may take long, and the server is back.  -> the ticket that its end is told with"""
        ticket = self.breaker.begun(ticket)
        self.let_in()
        return ticket

    def level_of(self, failure: Failure) -> int:
        """How loudly the log is told: what a breaker ends is told each time, anything else may come with every request."""
        # That a server is down or full is told once by whoever found it so, and not again for each request.
        if failure.stale or failure.code in UNASKED:
            return logging.DEBUG
        if not failure.blame:
            now = monotonic()
            if now < self._told.get(failure.code, 0.0):
                return logging.DEBUG
            self._told[failure.code] = now + _TOLD_ONCE_IN
        return logging.WARNING

    def blame(self, error: BaseException, ticket: int, name: str, key: str = "") -> None:
        """What an attempt for a key that ended with an error says of the server."""
        breaker = self.breaker
        if not isinstance(error, Failure) or error.stale:
            breaker.leave(ticket)
            return
        was = breaker.state
        if error.blame:
            breaker.failure(ticket, None if error.of_server else key)
        else:
            breaker.leave(ticket)
        if error.rest is not None:
            breaker.rest(error.rest, ticket, limited=error.status == 429)
        if breaker.state != was:
            _log.warning("%s is left alone for %.0f s", name, breaker.wait)


class Servers:
    """How an expert is doing at all of its addresses."""

    def __init__(self, expert: Expert, before: "Servers | None" = None) -> None:
        """As it was, where it was before: its standings go on."""
        self.expert = expert
        known = {} if before is None else {_place(each.server): each for each in (*before.each, *before.leaving)}
        self.each: list[Standing] = [known.get(_place(server)) or Standing(server) for server in expert.servers]
        # Asked no more; should they come back, what is under way there still counts.
        self.leaving: list[Standing] = [each for each in known.values() if each not in self.each and each.slots.taken]

    def update(self) -> None:
        """The expert is that of another experts file: its servers are now as it says."""
        for standing, server in zip(self.each, self.expert.servers, strict=True):
            standing.update(server)
            standing.beside = [each.slots for each in self.each if each is not standing]
        self._let_in()

    async def slot(self, standing: Standing, key: str, but: Collection[Standing]) -> Standing:
        """Who has a slot for a request of a key: this one, or whichever has one first but for these; Failure where none has."""
        others = [each.slots for each in self.each if each not in but]
        try:
            slots = await standing.slots.take(standing.server.first_byte_s, key, others)
        except BaseException as error:
            # A turn that came in the same moment was passed on, where perhaps nobody waits.
            self._let_in()
            if not isinstance(error, Full):
                raise
            message = "has more requests waiting than it takes"
            raise Failure(429, "queue_full", message, blame=False, rest=error.retry_after) from None
        return next((each for each in self.each if each.slots is slots), standing)

    def _let_in(self) -> None:
        for standing in self.each:
            standing.let_in()

    def next(self, but: Collection[Standing] = (), talk: Talk | None = None) -> Standing | None:
        """The server with the fewest requests, the first of those, of who may be asked and is none of these.

        A conversation begins at the one of those where it belongs, and stays there, where its prompt is cached, while that has
        not much more to do than the others.
        Whoever is due to be tried comes first, or else, with many requests or few, nobody might ever find that it is back; but
        last for a request that has failed already.
        Where nobody may be asked it is, with `but` none, whom that is soonest true of: what it says is then the reason.
        """
        others = [each for each in self.each if each not in but]
        if up := [each for each in others if not each.breaker.down]:
            least = min(up, key=lambda each: (each.due == bool(but), each.load))
            if talk is None or but or len(up) == 1 or least.due:
                return least
            home = max(up, key=lambda each: each.affinity(talk))
            most = _BUSIER_TIMES * least.load + _BUSIER_BY if talk.begun and home.free else least.load
            return home if home.load <= most else least
        return None if but else min(others, key=lambda each: each.breaker.wait)

    def shown(self, standing: Standing) -> str:
        """The expert, and where it has several which of its servers."""
        return self.expert.shown(standing.server)

    @property
    def state(self) -> str:
        """Of the breaker that is best off."""
        return min((each.breaker.state for each in self.each), key=_STATES.index)

    @property
    def down(self) -> bool:
        """Whether nobody may be asked now."""
        return all(each.breaker.down for each in self.each)

    @property
    def busy(self) -> bool:
        """Whether nobody may be asked now only because all asked for fewer requests."""
        return all(each.breaker.busy for each in self.each)

    @property
    def wait(self) -> float:
        """Seconds until somebody may be asked."""
        return min(each.breaker.wait for each in self.each)

    @property
    def away(self) -> int:
        """How many of the servers are left alone or on trial."""
        return sum(each.breaker.state != "closed" for each in self.each)

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return sum(each.slots.queued for each in self.each)

    @property
    def under_way(self) -> bool:
        """Whether any request is."""
        return any(each.slots.taken for each in (*self.each, *self.leaving))


def _place(server: Expert) -> tuple[str, str]:
    return server.base_url, server.model


def _access(server: Expert) -> tuple[str | None, str, str]:
    return server.key, server.key_header, server.query
