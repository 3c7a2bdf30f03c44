"""Which expert should answer a query: learned from a log of outcomes, for any trade-off of quality against price.

router = Router(price_of_error=0.02).fit(read_log("outcomes.jsonl"))
router.route("prove that the limit is prime").expert
"""

from importlib.util import find_spec

from deferral.errors import installing

# Found, not imported: what only learning needs takes more memory than a gateway does.
if missing := [name for name in ("scipy", "safetensors", "threadpoolctl") if find_spec(name) is None]:
    raise ImportError(f"the router needs {', '.join(missing)}: {installing('router')}")

from deferral.routing.cached_encoder import CachedEncoder
from deferral.routing.cascade import Cascade
from deferral.routing.cascade_fitting import answers_in, fit_cascade
from deferral.routing.confidence import Confidence, confidence_of, confidence_of_reply
from deferral.routing.constraints import Abilities, Needs
from deferral.routing.decisions import Decision, Decisions
from deferral.routing.log_files import read_log, write_log
from deferral.routing.outcomes import Log, Outcome, log_of_table
from deferral.routing.planning import Plan
from deferral.routing.prices import PriceModel, list_prices, token_prices
from deferral.routing.router import Router
from deferral.routing.table import Table, cost_table

__all__ = [
    "Abilities",
    "CachedEncoder",
    "Cascade",
    "Confidence",
    "Decision",
    "Decisions",
    "Log",
    "Needs",
    "Outcome",
    "Plan",
    "PriceModel",
    "Router",
    "Table",
    "answers_in",
    "confidence_of",
    "confidence_of_reply",
    "cost_table",
    "fit_cascade",
    "list_prices",
    "log_of_table",
    "read_log",
    "token_prices",
    "write_log",
]
