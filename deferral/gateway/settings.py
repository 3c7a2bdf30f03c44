"""What an operator sets for a gateway, beside its router, its experts and its keys."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from deferral.gateway.hysteresis import RULES, Rules
from deferral.routing.table import check_share

__all__ = ["Settings", "is_loopback"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Times in seconds, sizes in bytes.

    `explore` is the share of the queries that go to an expert drawn at random (None: the router's own); `deadline_s` is how
    long a slow encoder may take before the static mix decides; `retention_days` is how long texts are kept, `record_days` how
    long decisions and feedback are (None: without an end); `retry_share` bounds retries as a share of the requests;
    `router_folder` and `experts_file` are what a reload reads; `encoder` is the folder of the sentence encoder that the router
    was fitted with, if it was; `shadow_folder` a candidate router that decides beside it without being used; `traces`
    sends spans by OpenTelemetry, as its variables OTEL_* say; `workers` is how many processes serve, `metrics_folder` where
    they add up their metrics; `alarm_url` is where alarms of drift are posted to, with the bearer `alarm_token` if there is
    one; `conversations` is when a conversation changes its expert (None: every request is decided by itself).
    """

    database: str = "sqlite:///deferral-gateway.db"
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    explore: float | None = None
    store_text: bool = False
    retention_days: float | None = None
    record_days: float | None = None
    admin_key: str | None = field(default=None, repr=False)
    max_request_bytes: int = 10 * _MIB
    max_reply_bytes: int = 32 * _MIB
    deadline_s: float = 0.025
    retry_share: float = 0.2
    router_folder: Path | None = None
    experts_file: Path | None = None
    encoder: Path | None = None
    shadow_folder: Path | None = None
    traces: bool = False
    metrics_folder: Path | None = None
    alarm_url: str | None = field(default=None, repr=False)
    alarm_token: str | None = field(default=None, repr=False)
    conversations: Rules | None = RULES

    def __post_init__(self) -> None:
        if self.explore is not None:
            check_share("explore", self.explore)
        if self.admin_key is not None and len(self.admin_key) < 16:
            raise ValueError(
                "admin_key (DEFERRAL_ADMIN_KEY): expected at least 16 characters; make one with `openssl rand -hex 32`"
            )
        for name in ("admin_key", "alarm_token"):
            value = getattr(self, name)
            if value is not None and not (value.isascii() and value.isprintable() and " " not in value):
                # It is not repeated: it is a secret.
                raise ValueError(f"{name}: expected printable ASCII characters without spaces; it is sent in a header")
        if self.alarm_url is not None and not _is_address(self.alarm_url):
            # It is not repeated: such addresses are often secrets.
            raise ValueError("alarm_url: expected an address that begins with http:// or https:// and names a host; got another")
        if self.alarm_token is not None and self.alarm_url is None:
            raise ValueError("alarm_token (DEFERRAL_ALARM_TOKEN): expected alarm_url (--alarm-url) as well; it is sent there")
        if self.alarm_token is not None and self.alarm_url is not None and urlsplit(self.alarm_url).username is not None:
            raise ValueError("alarm_url: expected no user and password in it where there is a token; one of them can be sent")
        if not 0 <= self.retry_share <= 1:
            raise ValueError(f"retry_share: expected a share of the requests in [0, 1], got {self.retry_share}")
        if not 1 <= self.workers <= 256:
            raise ValueError(f"workers: expected 1 to 256 processes, got {self.workers}")
        for name in ("max_request_bytes", "max_reply_bytes", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to bind to."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
