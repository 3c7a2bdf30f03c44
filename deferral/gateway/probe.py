"""How a running gateway is doing, by its own account."""

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from deferral.errors import DataError

__all__ = ["probe"]

_TIMEOUT = 5.0
_MOST_BYTES = 1 << 22


def probe(url: str, admin_key: str | None = None) -> dict[str, Any]:
    """{"ready": what /ready says, "metrics": {name and labels: value}}; DataError where nothing answers.

    Histograms are left out, and all metrics where the key is not the admin's.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: expected the address of a gateway, http://127.0.0.1:8080 say")
    _, ready = _get(f"{url.rstrip('/')}/ready", None)
    status, text = _get(f"{url.rstrip('/')}/metrics", admin_key)
    try:
        said = json.loads(ready)["status"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{url}: /ready does not answer as a gateway does, {ready[:100]!r}") from None
    return {"ready": said, "metrics": _samples(text) if status == 200 else {}}


def _get(url: str, key: str | None) -> tuple[int, str]:
    try:
        request = Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
        with urlopen(request, timeout=_TIMEOUT) as reply:
            return reply.status, reply.read(_MOST_BYTES).decode("utf-8", "replace")
    except HTTPError as error:
        with error:
            return error.code, error.read(_MOST_BYTES).decode("utf-8", "replace")
    except (URLError, OSError, ValueError) as error:
        raise DataError(f"{url}: no gateway answers, {error}") from error


def _samples(text: str) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.type in ("counter", "gauge") else ():
            if not sample.name.endswith("_created"):
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
