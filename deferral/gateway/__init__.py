"""An OpenAI-compatible server around a router: small models answer what they can, experts the rest, all of it on record.

from deferral.gateway.app import gateway
app = gateway(Router.load("router/"), read_experts("experts.toml"), settings=Settings())

or `deferral serve router/ --experts experts.toml`.
"""

from importlib.util import find_spec

from deferral.errors import installing

for _needed in ("aiohttp", "prometheus_client", "sqlalchemy", "starlette", "uvicorn"):
    if find_spec(_needed) is None:
        raise ImportError(f"the gateway needs {_needed}: {installing('gateway')}")
