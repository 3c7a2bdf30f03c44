"""Plans of a router, each made once for a set of experts and a setting, and never on the time of others."""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deferral.gateway.problems import Problem
from deferral.gateway.requests import NO_HINTS, Hints, Setting
from deferral.routing.constraints import Needs
from deferral.routing.planning import Plan
from deferral.routing.router import Router

__all__ = ["UNMET", "Plans"]

_PLANS = 256
# One for each set of experts that are up and each hundredth by which a budget runs low.
_USUAL_PLANS = 4096
# Settings of clients that are planned at the same time.
_MOST_PLANNED = 32
UNMET = "setting_cannot_be_met"


class Plans:
    """They go through the held-out rows once for each set of experts, in threads that `close` ends."""

    def __init__(self, router: Router, settings: Iterable[Setting] = ()) -> None:
        """`settings` are the operator's own, by aliases."""
        self._router, self._settings = router, {NO_HINTS.setting, *settings}
        # Clients may set what they like: plans for that must neither drive out nor hold up those that all others need.
        self._others: dict[Any, Plan] = {}
        self._usual: dict[Any, Plan] = {}
        self._planning: dict[Any, asyncio.Future[Plan]] = {}
        self._judged: set[frozenset[str]] = set()  # of whom it is known what deciding among them is worth
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._usual_planner = ThreadPoolExecutor(1, thread_name_prefix="plan the usual")

    async def of(self, allow: frozenset[str], hints: Hints, thrift: float) -> Plan:
        """How to decide among those allowed, by these hints; Problem 400 where they cannot be met, 503 where too many are new."""
        # A factor of two digits keeps the plans few.
        factor = max(round(thrift, 2), 0.01)
        key = (allow, hints.setting, factor)
        plan = self._kept_for(hints).get(key)
        if plan is not None:
            return plan
        try:
            if allow in self._judged and not hints.bounded:
                plan = self._planned(allow, hints, factor)
                self._keep(key, plan, hints)
            else:
                # This goes through the held-out rows, long enough to be felt by others.
                plan = await self._of_all(key, lambda: self._planned(allow, hints, factor), hints)
        except ValueError as error:
            raise Problem(400, UNMET, str(error)) from None
        return plan

    async def _of_all(self, key: Any, work: Callable[[], Plan], hints: Hints) -> Plan:
        """One plan for all who come for it at the same time: where an expert fails, thousands may."""
        planning = self._planning.get(key)
        if planning is None:
            # Of outages there are few, of settings as many as clients like.
            if len(self._planning) >= _MOST_PLANNED and hints.setting not in self._settings:
                raise Problem(503, "busy", "too many new settings at the same time; send it again", retry_after=1)
            planner = self._usual_planner if hints.setting in self._settings else self._planner
            planning = self._planning[key] = asyncio.get_running_loop().run_in_executor(planner, work)
            planning.add_done_callback(lambda done: self._has_planned(key, done, hints))
        return await asyncio.shield(planning)

    def _has_planned(self, key: Any, done: "asyncio.Future[Plan]", hints: Hints) -> None:
        del self._planning[key]
        # An error is for those who wait; if nobody does, it would be reported as never retrieved.
        if not done.cancelled() and done.exception() is None:
            if hints.max_latency is None:
                self._judged.add(key[0])
            self._keep(key, done.result(), hints)

    def _kept_for(self, hints: Hints) -> dict[Any, Plan]:
        return self._usual if hints.setting in self._settings else self._others

    def _keep(self, key: Any, plan: Plan, hints: Hints) -> None:
        plans = self._kept_for(hints)
        if len(plans) >= (_PLANS if plans is self._others else _USUAL_PLANS):
            plans.clear()
        plans[key] = plan

    def _planned(self, allow: frozenset[str], hints: Hints, factor: float) -> Plan:
        needs = Needs(allow=allow)
        plan = self._router.plan(needs=needs, **hints.setting_by_name)
        if factor < 1:
            return self._router.plan(needs=needs, price_of_error=plan.price_of_error * factor, max_latency=hints.max_latency)
        return plan

    def close(self) -> None:
        """Whoever waits still has a plan."""
        self._planner.shutdown(wait=False)
        self._usual_planner.shutdown(wait=False)
