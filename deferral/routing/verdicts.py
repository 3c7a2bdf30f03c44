"""What deciding by a router was worth on the rows held out, among all of its experts or some, and so whether it is used."""

from dataclasses import replace

import numpy as np

from deferral.routing.fitted import Fitted
from deferral.routing.held_out import Judged

__all__ = ["judged_again", "report", "verdict", "why_not"]

_MOST = 256


def verdict(state: Fitted, mask: np.ndarray | None = None) -> Judged | None:
    """What deciding among some of the experts was worth on the rows held out.  (E,) bool -> Judged, or None

    Newcomers have no outcomes there, and are not judged; nor is anybody where fewer than two others are left, of whom what
    was found among all has to do.
    """
    known = _known(state, mask)
    return state.judged if known is None or known.sum() == (state.places >= 0).sum() else _judged(state, known)


def _known(state: Fitted, mask: np.ndarray | None) -> np.ndarray | None:
    """Of whom there are outcomes among those who may be asked, if they can be judged."""
    known = state.places >= 0
    known = known if mask is None else known & mask
    return known if state.judged is not None and known.sum() > 1 else None


def _judged(state: Fitted, known: np.ndarray, errors: tuple[float, ...] = ()) -> Judged:
    assert state.judged is not None
    key = (known.tobytes(), errors)
    found = state.verdicts.get(key)
    if found is None:
        found = state.search.judged(known, np.array(errors) if errors else None)
        if np.isnan(state.judged.oracle).any():
            # Doubly robust outcomes are estimates with noise, whose largest is not the outcome of the best expert.
            found = replace(found, oracle=np.full_like(found.oracle, np.nan))
        if len(state.verdicts) >= _MOST:
            state.verdicts.clear()
        state.verdicts[key] = found
    return found


def judged_again(state: Fitted) -> Fitted:
    """With the verdict on the experts and prices of today."""
    known = _known(state, None)
    if known is None:
        return replace(state, held_costs={}, room="")
    room = state.search.room(known)
    again = _judged(state, known)
    if np.isnan(again.oracle).any():
        room = replace(room, oracle=np.nan)
    return replace(state, judged=again, held_costs={}, room=str(room))


def why_not(state: Fitted, error: float, mask: np.ndarray | None = None) -> str:
    """Why the learned policy is not used among these experts at this price of an error; "" if it is."""
    found, known = verdict(state, mask), _known(state, mask)
    if found is None:
        return "there is too little to learn from"
    if mask is not None and mask.sum() == 1:
        return ""
    if known is not None and not found.errors[0] <= error <= found.errors[-1]:
        # Prices whose means are close may differ much from query to query: decisions change there, too.
        found = _judged(state, known, (float(error),))
    errors, better = found.errors, found.better
    place = int(np.searchsorted(errors, error))
    around = np.array([max(place - 1, 0), min(place, len(errors) - 1)])
    if better[around].all():
        return ""
    worst = int(around[(found.gain - found.half_width)[around].argmin()])
    gain, half = found.gain[worst], found.half_width[worst]
    among = "" if known is None or mask is None or mask.all() else " among those who may be asked"
    return (
        f"on held-out queries routing{among} saved {gain:.4f} ± {half:.4f} errors a query at ${errors[worst]:.3g} an error: "
        "maybe nothing"
    )


def report(state: Fitted, error: float) -> str:
    """What was held out, what won, and what it is worth at this price of an error."""
    if state.judged is None:
        return "Too little to learn from: the static mix is used."
    if len(state.experts) == 1:
        return f"{state.experts[0]} is the only expert left."
    known = _known(state, None)
    at = state.judged if known is None else _judged(state, known, (float(error),))
    place = int(np.abs(np.log(at.errors / error)).argmin())
    oracle = "" if np.isnan(at.oracle[place]) else f", oracle {at.oracle[place]:.4f}"
    apart = "" if abs(at.errors[place] / error - 1) < 0.01 else f" (of those tried the nearest to ${error:.3g})"
    if state.held_costs:
        costs = ", ".join(f"{name} {cost:.4f}" for name, cost in state.held_costs.items())
        why_used = ", since none alone is cheaper with confidence" if state.winner == "blend" else ""
        first = f"Held-out cost over all trade-offs: {costs}; used: {state.winner}{why_used}."
    elif state.room:
        first = "Judged anew: experts or prices are others than at the fit."
    else:
        first = "The verdict is that of the fit: too little is left of it to judge anew."
    lines = [
        first,
        f"At ${at.errors[place]:.3g} an error{apart}: routed {at.learned[place]:.4f}, "
        f"best single expert {at.static[place]:.4f}, random {at.random[place]:.4f}"
        f"{oracle} errors a query; saved {at.gain[place]:.4f} ± {at.half_width[place]:.4f} (95%).",
    ]
    if at.half_width[place] == 0:
        lines.append("At this price of an error, which is in dollars, every query goes to one expert.")
    if state.room:
        lines.append(f"Routability: {state.room}.")
    if why := why_not(state, error):
        used = f"The static mix is used: {why}."
    elif at.gain[place] > at.half_width[place]:
        used = "The router is used: it saves with confidence."
    else:
        used = "The router is used: nothing speaks against it here, and over all trade-offs it agrees with the outcomes."
    return "\n".join([*lines, used])
