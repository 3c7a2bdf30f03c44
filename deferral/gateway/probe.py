"""How a running gateway is doing, by its own account."""

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from deferral.errors import DataError
from deferral.gateway.settings import is_loopback

__all__ = ["probe"]

_TIMEOUT = 5.0
_MOST_BYTES = 1 << 26


def probe(url: str, admin_key: str | None = None) -> dict[str, Any]:
    """{"ready": what /ready says, "metrics": {name and labels: value}}; DataError where nothing answers.

    Histograms are left out, and all metrics where the key is not the admin's.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: expected the address of a gateway, http://127.0.0.1:8080 say")
    _, ready = _get(f"{url.rstrip('/')}/ready", None)
    try:
        said = json.loads(ready)["status"]
    except (ValueError, KeyError, TypeError):
        # Something else listens there: it must not get the key.
        raise DataError(f"{url}: /ready does not answer as a gateway does, {ready[:100]!r}") from None
    status, text = _get(f"{url.rstrip('/')}/metrics", admin_key)
    if status != 200:
        return {"ready": said, "metrics": {}}
    try:
        return {"ready": said, "metrics": _samples(text)}
    except ValueError as error:
        raise DataError(f"{url}: /metrics does not answer as a gateway does, {str(error)[:100]}") from error


def _opener(url: str) -> OpenerDirector:
    """The key is for this address alone: no redirects, and no proxy to this machine itself."""
    here = is_loopback(urlsplit(url).hostname or "")
    return build_opener(_Unredirected(), *([ProxyHandler({})] if here else []))


class _Unredirected(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _get(url: str, key: str | None) -> tuple[int, str]:
    try:
        request = Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
        with _opener(url).open(request, timeout=_TIMEOUT) as reply:
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
