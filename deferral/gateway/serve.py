"""A gateway as a process: bound to an address, until it is told to end."""

import logging
import signal

import uvicorn

from deferral.gateway.access import must_have_key
from deferral.gateway.app import gateway, load_router
from deferral.gateway.experts_file import read_experts
from deferral.gateway.logs import logging_to
from deferral.gateway.settings import Settings

__all__ = ["run"]

_log = logging.getLogger("deferral.gateway")
# Clients keep connections for later; one that the server closes first may lose a request on its way.
_KEEP_ALIVE = 75


def run(settings: Settings, *, log_level: str = "info") -> None:
    """Serve until SIGTERM or SIGINT; what is under way then is finished, streams too.

    ValueError where it would be reachable from other machines without any key.
    """
    assert settings.experts_file is not None
    router, experts = load_router(settings), read_experts(settings.experts_file)
    must_have_key(settings)
    app = gateway(router, experts, settings=settings)
    # A reply ends by itself within its expert's time.
    patience = int(max(expert.total_s for expert in experts.values())) + 30
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=patience,
        backlog=4096,
    )
    # When all is done, uvicorn raises the signal that ended it once more, for whoever was there before.
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda *_: None)
    with logging_to(level=log_level):
        _log.info("serving %s at %s:%d", ", ".join(experts), settings.host, settings.port)
        uvicorn.Server(config).run()
