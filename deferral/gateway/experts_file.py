"""The experts file: where each expert is reached, what it can do, what it costs, and how long it may take."""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from yarl import URL

from deferral.errors import DataError
from deferral.gateway.numbers import is_number, is_whole

__all__ = ["AUTO", "Expert", "expert_names", "experts_in", "name_fault", "place_in", "read_experts", "tables"]

# Names of a model that ask the router.
AUTO = frozenset({"auto", "deferral/auto"})
_NAME = re.compile(r"[ -~]{1,100}")
_HEADER_VALUE = re.compile(r"[!-~]+")
# What the gateway itself adds to a base_url.
_ADDED = re.compile(r"(/chat/completions|/completions|/embeddings|/responses|/models)/*")
_SECTION = re.compile(r"""\s*\[\s*(experts|aliases)\s*\.\s*(?:"([^"]*)"|'([^']*)'|([\w-]+))\s*\]""")
_KEY_FROM = ("key_env", "key_file")
_HEADER_NAME = re.compile(r"[a-z0-9-]+")
# Headers that are set by the gateway, or by its HTTP client.
_TAKEN = frozenset(
    {
        "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host", "keep-alive",
        "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_QUERY = re.compile(r"|[\w.~%+-]+=[\w.~%+:/,-]*(?:&[\w.~%+-]+=[\w.~%+:/,-]*)*", re.ASCII)
# Fields of a request that the gateway itself reads: to decide, to count, or to take a stream apart.
_NEEDED = frozenset({"model", "messages", "stream", "stream_options", "n", "best_of", "tools", "functions", "logprobs"})
# Limits of an answer's length, by which dollars are set aside: they may have another name at an expert, but must reach it.
_LENGTHS = frozenset({"max_tokens", "max_completion_tokens"})
_LOOKS_LIKE_A_KEY = frozenset({"key", "api_key", "apikey", "token", "secret", "password", "authorization", "access_token", "sig"})


@dataclass(frozen=True)
class Expert:
    """A model at an OpenAI-compatible server, or at several.  Prices in dollars per million tokens, times in seconds.

    `other_urls` are further addresses of the same model: they share its requests and stand in for each other, and limits hold for
    each.  `model` is its name there; `key` comes from an environment variable or a file, is sent as `key_header` says, and never
    shown; `query` follows every path of the address.  `cached_input_price` is that of input which the prompt cache holds, None
    where there is no discount.  `context_tokens=None` is no limit, `region=None` is in none that is asked for.
    `first_byte_s` is the longest wait for the first byte, and between two.  Beyond `max_concurrent` requests wait, at most
    `max_waiting` of them.  With `route=False` it is reached by its name only.  `responses`: it has the Responses API.
    `logprobs`: it reports the log-probabilities of its answers where a chat asks for them, so that a cascade may ask it first.
    `stream_usage`: streams are asked to report their tokens also where a client does not ask for that.
    `rename`, `drop` and `defaults` are of fields of a chat: by what other name it knows them, which it does not take, and what
    stands in for those that are not there.
    """

    name: str
    base_url: str
    model: str = ""
    other_urls: Sequence[str] = ()
    key: str | None = field(default=None, repr=False)
    key_header: str = "authorization"
    query: str = ""
    input_price: float = 0.0
    output_price: float = 0.0
    cached_input_price: float | None = None
    context_tokens: int | None = None
    tools: bool = True
    images: bool = True
    region: str | None = None
    connect_s: float = 5.0
    first_byte_s: float = 60.0
    total_s: float = 600.0
    max_concurrent: int = 256
    max_waiting: int = 1024
    route: bool = True
    responses: bool = True
    logprobs: bool = False
    stream_usage: bool = False
    rename: Mapping[str, str] = field(default_factory=dict, hash=False)
    drop: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for check in (_check_name, _check_urls, _check_key, _check_query, _check_numbers, _check_flags, _check_fields):
            check(self)
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        object.__setattr__(self, "other_urls", tuple(url.rstrip("/") for url in self.other_urls))
        object.__setattr__(self, "model", self.model or self.name)
        object.__setattr__(self, "drop", tuple(self.drop))

    @property
    def servers(self) -> "tuple[Expert, ...]":
        """It at each of its addresses alone."""
        if not self.other_urls:
            return (self,)
        return tuple(replace(self, base_url=url, other_urls=()) for url in (self.base_url, *self.other_urls))

    def shown(self, server: "Expert") -> str:
        """Its name, and where it has several servers the address of this one."""
        return f"{self.name} at {server.base_url}" if self.other_urls else self.name

    def price(self, input_tokens: float, output_tokens: float, cached_tokens: float = 0) -> float:
        """Dollars, where the prompt cache held `cached_tokens` of the input."""
        dollars = input_tokens * self.input_price + output_tokens * self.output_price
        if self.cached_input_price is not None:
            dollars -= min(cached_tokens, input_tokens) * (self.input_price - self.cached_input_price)
        return dollars / 1e6


class _FieldError(ValueError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def read_experts(path: str | Path, environ: Mapping[str, str] = os.environ) -> dict[str, Expert]:
    """The experts of a TOML file, one table [experts.NAME] each; DataError names the line.

    Fields are those of `Expert`, but for the key: `key_env` names the environment variable that holds it, or `key_file` the file,
    beside the experts file where it is no absolute path.
    """
    path = Path(path)
    return experts_in(path, *tables(path), environ)


def experts_in(path: Path, text: str, found: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Expert]:
    """`read_experts` of a file whose `tables` are read already."""
    result = {}
    for name, table in _expert_tables(path, found).items():
        if not isinstance(table, dict):
            raise DataError(f"{place_in(path, text, name)}: expected a table [experts.{name}], got {type(table).__name__}")
        try:
            result[name] = _expert(name, table, environ, path.parent)
        except _FieldError as error:
            raise DataError(f"{place_in(path, text, error.field, name)}: expert {name!r}, {error}") from None
    return result


def expert_names(path: str | Path) -> list[str]:
    """The names alone, for whoever does not have the keys; DataError where the file cannot be read."""
    path = Path(path)
    _, found = tables(path)
    return list(_expert_tables(path, found))


def tables(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of the file, and what it holds; DataError where that is no experts file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the experts file cannot be read, {error}") from error
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # The message of tomllib ends with the line.
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path}: expected TOML; {reason}") from error
    if unknown := sorted(set(found) - {"experts", "aliases"}):
        message = f"expected tables [experts.NAME] and [aliases.NAME], got {unknown[0]!r}"
        raise DataError(f"{place_in(path, text, unknown[0])}: {message}")
    return text, found


def _expert_tables(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    experts = found.get("experts")
    if not isinstance(experts, dict) or not experts:
        raise DataError(f"{path}: expected at least one table [experts.NAME] with a base_url")
    return experts


def _expert(name: str, table: dict[str, Any], environ: Mapping[str, str], folder: Path) -> Expert:
    known = [each.name for each in fields(Expert) if each.name not in ("name", "key")]
    for given in table:
        if given in _KEY_FROM:
            continue
        # The value is never repeated: it may be a key.
        if given.lower() in _LOOKS_LIKE_A_KEY:
            raise _FieldError(given, "keys are not read from files; put it in an environment variable and name that in key_env")
        if given not in known:
            raise _FieldError(given, f"unknown; expected one of {', '.join([*known, *_KEY_FROM])}")
    if "base_url" not in table:
        raise _FieldError("base_url", "missing; expected the server's address, http://127.0.0.1:8001/v1 say")
    values = {given: value for given, value in table.items() if given not in _KEY_FROM}
    if len(values) < len(table) - 1:
        raise _FieldError("key_file", "expected a key from one place, got key_env as well")
    if (file := table.get("key_file")) is not None:
        values["key"] = _key_in(file, folder)
    variable = table.get("key_env")
    if variable is not None:
        if not isinstance(variable, str) or not re.fullmatch(r"[A-Za-z_]\w*", variable):
            raise _FieldError("key_env", "expected the name of an environment variable, not a key")
        if not environ.get(variable):
            raise _FieldError("key_env", f"the environment variable {variable} is not set; export it, or leave key_env out")
        values["key"] = environ[variable].strip()
    return Expert(name, **values)


def _key_in(file: Any, folder: Path) -> str:
    if not isinstance(file, str) or not file:
        raise _FieldError("key_file", f"expected the path of a file, got {type(file).__name__}")
    try:
        key = (folder / file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise _FieldError("key_file", f"it cannot be read, {getattr(error, 'strerror', None) or 'it is no text'}") from None
    if not key:
        raise _FieldError("key_file", "it is empty; expected the key alone")
    return key


def name_fault(name: str) -> str:
    """What is wrong with a name that clients send as that of a model, "" where nothing is."""
    fits = _NAME.fullmatch(name) and name == name.strip()
    return "" if fits else "expected 1 to 100 printable ASCII characters"


def _check_name(expert: Expert) -> None:
    if fault := name_fault(expert.name):
        raise _FieldError("name", fault)
    if expert.name in AUTO:
        raise _FieldError("name", f"{expert.name!r} asks the router; call the expert otherwise")
    if not isinstance(expert.model, str) or not all(character.isprintable() for character in expert.model):
        raise _FieldError("model", "expected the name of the model at the server")
    if expert.region is not None and (not isinstance(expert.region, str) or not expert.region):
        raise _FieldError("region", f"expected a text, got {expert.region!r}")


def _check_urls(expert: Expert) -> None:
    if isinstance(expert.other_urls, str) or not isinstance(expert.other_urls, Sequence):
        raise _FieldError("other_urls", f"expected a list of addresses, got {type(expert.other_urls).__name__}")
    _check_url("base_url", expert.base_url)
    seen = {expert.base_url.rstrip("/")}
    for url in expert.other_urls:
        _check_url("other_urls", url)
        if url.rstrip("/") in seen:
            raise _FieldError("other_urls", f"expected addresses that differ, and from base_url too; got {url!r} twice")
        seen.add(url.rstrip("/"))


def _check_url(field: str, url: object) -> None:
    if not isinstance(url, str):
        more = "; further addresses go into other_urls" if field == "base_url" and isinstance(url, list) else ""
        raise _FieldError(field, f"expected a text, got {type(url).__name__}{more}")
    try:
        parts = urlsplit(url)
        URL(url)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or (parts.port == 0)
    except ValueError:
        secret, wrong = False, True
    if secret:
        raise _FieldError(field, "expected no user, password, query or fragment; a key goes into key_env, a query into query")
    if wrong or not _HEADER_VALUE.fullmatch(url):
        raise _FieldError(field, f"expected http:// or https:// with a host, got {url!r}")
    if (added := _ADDED.search(url)) and added.end() == len(url):
        wanted = url[: added.start()]
        raise _FieldError(field, f"the gateway adds {added[1]} itself; write {wanted!r}, got {url!r}")


def _check_key(expert: Expert) -> None:
    if expert.key is not None and not _HEADER_VALUE.fullmatch(expert.key):
        raise _FieldError("key_env", "it, or key_file, holds characters that no key has (spaces, line ends or non-ASCII)")
    if not isinstance(expert.key_header, str) or not _HEADER_NAME.fullmatch(expert.key_header) or expert.key_header in _TAKEN:
        raise _FieldError("key_header", f"expected the name of a header in small letters, api-key say, got {expert.key_header!r}")


def _check_query(expert: Expert) -> None:
    if not isinstance(expert.query, str) or not _QUERY.fullmatch(expert.query):
        raise _FieldError("query", "expected name=value, joined by & where there are several")
    names = [part.partition("=")[0].lower().replace("-", "_") for part in expert.query.split("&")]
    if secret := next((name for name in names if name in _LOOKS_LIKE_A_KEY), ""):
        raise _FieldError("query", f"{secret}: a key has no place in an address, which is logged; use key_file and key_header")


def _check_numbers(expert: Expert) -> None:
    for name in ("input_price", "output_price", "cached_input_price", "connect_s", "first_byte_s", "total_s"):
        value = getattr(expert, name)
        if value is None and name == "cached_input_price":
            continue
        least = "0 or more" if name.endswith("price") else "above 0"
        if not is_number(value) or value < 0 or (value == 0 and least == "above 0"):
            raise _FieldError(name, f"expected a number, {least}, got {value!r}")
    if expert.cached_input_price is not None and expert.cached_input_price > expert.input_price:
        dearest = expert.input_price
        raise _FieldError(
            "cached_input_price", f"expected at most the input_price, {dearest:g}, got {expert.cached_input_price:g}"
        )
    for name, fewest in (("context_tokens", 1), ("max_concurrent", 1), ("max_waiting", 0)):
        value = getattr(expert, name)
        if value is None and name == "context_tokens":
            continue
        if not is_whole(value) or value < fewest:
            raise _FieldError(name, f"expected a whole number, {fewest} or more, got {value!r}")


def _check_flags(expert: Expert) -> None:
    for name in ("tools", "images", "route", "responses", "logprobs", "stream_usage"):
        if not isinstance(getattr(expert, name), bool):
            raise _FieldError(name, f"expected true or false, got {getattr(expert, name)!r}")


def _check_fields(expert: Expert) -> None:
    for name in ("rename", "defaults"):
        if not isinstance(getattr(expert, name), Mapping):
            raise _FieldError(name, f"expected a table such as {{ field = ... }}, got {getattr(expert, name)!r}")
    if isinstance(expert.drop, str) or not isinstance(expert.drop, Sequence):
        raise _FieldError("drop", f"expected a list of names, got {expert.drop!r}")
    named = {"rename": [*expert.rename, *expert.rename.values()], "drop": expert.drop, "defaults": expert.defaults}
    for name, given in named.items():
        for one in given:
            if not isinstance(one, str) or not one:
                raise _FieldError(name, f"expected names of fields of a request, got {one!r}")
            if one in _NEEDED or (one in _LENGTHS and name == "drop"):
                raise _FieldError(name, f"{one}: the gateway needs it as the client sent it")
    try:
        json.dumps(dict(expert.defaults), allow_nan=False)
    except (TypeError, ValueError):
        raise _FieldError("defaults", "expected values that JSON has: no dates, and no inf or nan") from None


def place_in(path: Path, text: str, key: str, name: str | None = None, *, section: str = "experts") -> str:
    """FILE:LINE of a key, in the table of this name; of the table where the key is not there."""
    inside, table_line = None, None
    for number, line in enumerate(text.splitlines(), 1):
        if found := _SECTION.match(line):
            inside = next(group for group in found.groups()[1:] if group is not None) if found[1] == section else None
            if inside is not None and inside == name:
                table_line = number
        elif line.lstrip().startswith("["):
            inside = None
            if name is None and re.match(rf"\s*\[+\s*[\"']?{re.escape(key)}\b", line):
                return f"{path}:{number}"
        if inside == name and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{path}:{number}"
        if table_line is None and re.match(rf"\s*[\"']?{re.escape(name or key)}[\"']?\s*=", line):
            table_line = number
    return f"{path}:{table_line}" if table_line else str(path)
