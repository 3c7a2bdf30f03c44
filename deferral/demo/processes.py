"""The servers of the gateway's demo: processes that end with the block that started them, even where it ends by SIGKILL.

`python -m deferral.demo.processes ROUTER ...` is `deferral serve ROUTER ...` until its standard input ends.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deferral.errors import DataError

__all__ = ["end_with_standard_input", "endpoint", "first_line", "gateway"]

_WAIT = 120.0  # seconds, for a start on a busy machine
_END = 15.0


@contextmanager
def endpoint(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The server of the model in a folder; its first line is its base URL."""
    command = [sys.executable, "-m", "deferral.demo.endpoint", str(folder)]
    with _process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def first_line(process: subprocess.Popen[str]) -> str:
    """What it says first; DataError if it ends without a word."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise DataError("the endpoint of a model did not start; its error is above")
    return line


@contextmanager
def gateway(router: Path, experts: Path, database: Path, log: Path, *, port: int = 0) -> Iterator[str]:
    """`deferral serve` around a router, ready for requests.  -> its base URL"""
    port = port or _free_port()
    command = [
        sys.executable, "-m", "deferral.demo.processes", str(router), "--experts", str(experts),
        "--port", str(port), "--database", str(database),
    ]  # fmt: skip
    with log.open("w") as lines, _process(command, stdin=subprocess.PIPE, stderr=lines, stdout=lines) as process:
        if not _comes_up(f"http://127.0.0.1:{port}/ready", process):
            raise DataError(f"the gateway did not start; its log ends with: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"


def end_with_standard_input() -> None:
    """End this process, in good order, when whoever holds the other end of its standard input is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="standard input", daemon=True).start()


@contextmanager
def _process(command: list[str], **streams: int | IO[str]) -> Iterator[subprocess.Popen[str]]:
    # In a session of its own: Ctrl-C is for the one who started it, who then ends the others in good order.
    process = subprocess.Popen(command, text=True, start_new_session=True, **streams)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _comes_up(url: str, process: subprocess.Popen[str]) -> bool:
    until = time.monotonic() + _WAIT
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


if __name__ == "__main__":
    from deferral.gateway.serve import serve

    end_with_standard_input()
    serve()
