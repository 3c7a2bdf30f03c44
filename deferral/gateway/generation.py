"""What a reload replaces as one: a router, its experts, and what decides between them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from deferral.gateway.aliases import Alias
from deferral.gateway.deciding import Decider
from deferral.gateway.eligible import served
from deferral.gateway.experts_file import AUTO, Expert
from deferral.gateway.settings import Settings
from deferral.routing.constraints import Needs
from deferral.routing.router import Router

__all__ = ["Generation", "check_aliases", "generation", "out_of_service"]

_log = logging.getLogger("deferral.gateway")


@dataclass(frozen=True)
class Generation:
    """A router and its experts, from one reload to the next; a request keeps the one it began with."""

    router: Router
    experts: Mapping[str, Expert]
    decider: Decider
    aliases: Mapping[str, Alias]
    routed: frozenset[str]  # names of models that ask the router


def generation(
    router: Router, experts: Mapping[str, Expert], settings: Settings, aliases: Mapping[str, Alias] | None = None
) -> Generation:
    """ValueError where an expert is not known to the router, none of the router's is left, or an alias cannot be met."""
    if missing := out_of_service(router, experts):
        _log.warning("out of service, since the experts file does not have them: %s", ", ".join(missing))
    if settings.explore is not None:
        router.explore = settings.explore
    aliases = dict(aliases or {})
    check_aliases(router, experts, aliases)
    own = [alias.hints.setting for alias in aliases.values()]
    decider = Decider(router, experts, deadline_s=settings.deadline_s, rules=settings.conversations, settings=own)
    routed = AUTO | {name for name, alias in aliases.items() if alias.routed}
    return Generation(router, dict(experts), decider, aliases, routed)


def check_aliases(router: Router, experts: Mapping[str, Expert], aliases: Mapping[str, Alias]) -> None:
    """ValueError where an alias sets what the router cannot meet among its experts."""
    everyone = frozenset(served(router, experts))

    def place(expert: str) -> str | None:
        can = router.abilities.get(expert)
        return experts[expert].region or (can.region if can else None)

    for name, alias in aliases.items():
        if not alias.routed:
            continue
        among = everyone if alias.hints.experts is None else everyone & alias.hints.experts
        regions = alias.hints.regions
        if regions is not None:
            among = frozenset(one for one in among if place(one) in regions)
        if not among:
            where = f" in {', '.join(sorted(regions))}" if regions else ""
            raise ValueError(f"alias {name!r}: none of its experts is served{where}")
        try:
            router.plan(needs=Needs(allow=among), **alias.hints.setting_by_name)
        except ValueError as error:
            raise ValueError(f"alias {name!r}: {error}") from error


def out_of_service(router: Router, experts: Mapping[str, Expert]) -> list[str]:
    """The experts of the router that are not there; ValueError where one is not known to it, or none of its own is left."""
    known = set(router.experts)
    if unknown := [name for name, expert in experts.items() if expert.route and name not in known]:
        raise ValueError(
            f"experts: the router does not know {unknown[0]!r}, it knows {', '.join(router.experts)}; correct the name, or say "
            "route = false for an expert that is reached by its name only"
        )
    left = served(router, experts)
    if not left:
        raise ValueError(f"experts: none of the router's is there; expected at least one of {', '.join(router.experts)}")
    return sorted(known - set(left))
