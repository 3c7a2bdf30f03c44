"""Prints pip's own index settings as the environment variables that uv reads, for `eval` in a shell.

uv ignores pip's configuration, so a machine whose pip is set up for a mirror, a local folder of wheels or a company's
certificate would otherwise not be served.  Nothing is written down: the values live as long as the calling shell.
"""

import ast
import shlex
import subprocess
import sys


def pip_settings() -> dict[str, list[str]]:
    """The settings of `pip config list` by option name; the environment overrides [install], which overrides [global]."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    rank = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listing.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in rank and rank[section] >= found.get(option, (-1, []))[0]:
            found[option] = (rank[section], str(ast.literal_eval(value)).split())
    return {option: values for option, (_, values) in found.items()}


def uv_environment(settings: dict[str, list[str]]) -> dict[str, str]:
    """The same settings under uv's names; every index is searched for the best version, as pip does."""
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for option, variable, separator in (
        ("index-url", "UV_DEFAULT_INDEX", " "),
        ("extra-index-url", "UV_INDEX", " "),
        ("find-links", "UV_FIND_LINKS", ","),
        ("trusted-host", "UV_INSECURE_HOST", " "),
        ("cert", "SSL_CERT_FILE", " "),
        ("timeout", "UV_HTTP_TIMEOUT", " "),
        ("default-timeout", "UV_HTTP_TIMEOUT", " "),
    ):
        if option in settings:
            environment[variable] = separator.join(settings[option])
    if settings.get("no-index", ["0"])[0].lower() in {"1", "true", "yes", "on"}:
        environment["UV_NO_INDEX"] = "1"
    return environment


if __name__ == "__main__":
    for name, value in uv_environment(pip_settings()).items():
        print(f"export {name}={shlex.quote(value)}")
