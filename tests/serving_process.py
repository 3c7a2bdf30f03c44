"""`deferral serve` as a process of its own, for tests that end it in ways that a thread cannot be ended."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Serving", "serving"]


class Serving:
    """A gateway with a router and an experts file of a folder, on its database gateway.db; `alone` in a process group."""

    def __init__(self, folder: Path, *options: str, alone: bool = False) -> None:
        self.folder, self.database = folder, folder / "gateway.db"
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [sys.executable, "-m", "deferral.cli", "serve", str(folder / "router"), "--port", str(self.port)]
        command += ["--experts", str(folder / "experts.toml"), "--database", str(self.database), *options]
        self._log = (folder / "gateway.log").open("a+")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=os.environ, start_new_session=alone)

    @property
    def log(self) -> str:
        """What it said."""
        return (self.folder / "gateway.log").read_text()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log

    def end(self, signal: int) -> int:
        """Send a signal, and wait for the end.  -> its exit status"""
        self.process.send_signal(signal)
        return self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


@contextmanager
def serving(folder: Path, *options: str, alone: bool = False) -> Iterator[Serving]:
    """The process, ready for requests; killed at the end, if it is still there."""
    process = Serving(folder, *options, alone=alone)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.close()
