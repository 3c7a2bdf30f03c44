"""Servers on loopback, each a process of its own, and the load that they are put under."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import click

from deferral.demo.questions import questions
from deferral.gateway.keys import Keys
from deferral.gateway.preparing import prepare

__all__ = ["CLIENTS", "LITELLM", "Server", "World", "wrk_figures"]

CLIENTS = 64
LITELLM = "litellm[proxy]==1.89.7"
_LUA = """
local bodies = {}
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
local headers = {["content-type"] = "application/json", ["authorization"] = "Bearer " .. os.getenv("KEY")}
local turn = 0
request = function()
  turn = turn + 1
  return wrk.format("POST", nil, headers, bodies[turn % #bodies + 1])
end
"""


@dataclass
class Server:
    """A process that answers chat completions."""

    name: str
    url: str
    pid: int

    def cpu(self) -> float:
        """Seconds of user and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, float]:
        """Resident memory now and at most, in MB of 10^6 bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return {
            name: int(re.search(rf"{key}:\s+(\d+)", text)[1]) * 1024 / 1e6 for name, key in (("now", "VmRSS"), ("most", "VmHWM"))
        }  # type: ignore[index]


@dataclass
class World:
    """What the parts share: servers, started when first asked for, files, and how long to load them."""

    folder: Path
    seconds: float
    rounds: int
    requests: int
    processes: ExitStack
    key: str = ""
    servers: dict[str, Server] = field(default_factory=dict)

    def upstream(self, *options: str) -> str:
        """The base URL of the upstream with these options."""
        name = " ".join(["upstream", *options])
        if name not in self.servers:
            command = [sys.executable, "-m", "benchmarks.serving.upstream", *options]
            process = self.processes.enter_context(_process(command, stdout=subprocess.PIPE))
            assert process.stdout is not None
            self.servers[name] = Server(name, f"http://127.0.0.1:{int(process.stdout.readline())}/v1", process.pid)
        return self.servers[name].url

    def passthrough(self) -> Server:
        """The bare pass-through."""
        command = [sys.executable, "-m", "benchmarks.serving.passthrough", self.upstream()]
        return self._started("bare", lambda port: [*command, str(port)], "/v1/models")

    def gateway(self, name: str = "gateway", *upstream: str, router: str = "blend") -> Server:
        """`deferral serve` with a fitted router, a key with limits and a budget, and the record on."""
        url = self.upstream(*upstream)
        experts = self.folder / f"{name}.toml"
        table = 'base_url = "{}"\ninput_price = {}\noutput_price = {}\nmax_concurrent = 4096\n'
        tables = [
            f"[experts.{each}]\n" + table.format(url, *prices) for each, prices in (("small", (0.1, 0.4)), ("large", (2.5, 10)))
        ]
        experts.write_text("\n".join(tables))
        database = self.folder / "gateway.db"
        if not self.key:
            self.key = _key(str(database))
        command = [sys.executable, "-m", "deferral.cli", "serve", str(self.folder / router), "--experts", str(experts)]
        command += ["--database", str(database), "--log-level", "warning"]
        return self._started(name, lambda port: [*command, "--port", str(port)], "/ready")

    def litellm(self) -> Server:
        """LiteLLM's proxy, one worker."""
        python = _litellm_environment()
        config = self.folder / "litellm.yaml"
        model = {"model": "openai/upstream", "api_base": self.upstream(), "api_key": "none"}
        settings = {"model_list": [{"model_name": "auto", "litellm_params": model}], "litellm_settings": {"telemetry": False}}
        config.write_text(json.dumps(settings))
        command = [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--num_workers", "1"]
        return self._started("litellm", lambda port: [*command, "--port", str(port)], "/health/liveliness")

    def bodies(self, *, stream: bool = False, model: str = "auto") -> Path:
        """Questions as request bodies, one a line."""
        path = self.folder / f"bodies-{model}-{stream}.jsonl"
        if not path.is_file():
            asked = questions(500, seed=1)
            extra = {"stream": True} if stream else {}
            lines = [
                json.dumps({"model": model, "messages": [{"role": "user", "content": each.text}], "max_tokens": 64} | extra)
                for each in asked
            ]
            path.write_text("\n".join(lines) + "\n")
        return path

    def wrk(
        self, url: str, *, clients: int = CLIENTS, seconds: float | None = None, stream: bool = False, model: str = "auto"
    ) -> dict[str, float]:
        """Load from wrk.  -> requests, requests a second, latencies in ms, bad replies"""
        script = self.folder / "post.lua"
        script.write_text(_LUA)
        command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds or self.seconds))}s", "--latency", "--timeout", "60s"]
        command += ["-s", str(script), f"{url}/chat/completions"]
        environment = {**os.environ, "BODIES": str(self.bodies(stream=stream, model=model)), "KEY": self.key or "none"}
        text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        figures = wrk_figures(text)
        if figures["bad"] or not figures["requests"]:
            raise click.ClickException(
                f"{url}: {figures['bad']:.0f} bad replies of {figures['requests']:.0f}; {_ends(self.folder)}"
            )
        return figures

    def load(self, kind: str, url: str, *options: str, stream: bool = False) -> dict[str, float]:
        """Load that wrk cannot make: see `benchmarks.serving.load`."""
        command = [sys.executable, "-m", "benchmarks.serving.load", kind, f"{url}/chat/completions"]
        command += [str(self.bodies(stream=stream)), "--key", self.key, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def one(self, url: str) -> None:
        """One request, however long it takes."""
        body = self.bodies().read_bytes().splitlines()[0]
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body, headers), timeout=120) as reply:
            reply.read()

    def _started(self, name: str, command: Callable[[int], list[str]], path: str) -> Server:
        if name not in self.servers:
            port = _free_port()
            log = self.processes.enter_context((self.folder / f"{name}.log").open("w"))
            process = self.processes.enter_context(_process(command(port), stdout=log, stderr=log))
            _wait(f"http://127.0.0.1:{port}{path}", process)
            self.servers[name] = Server(name, f"http://127.0.0.1:{port}/v1", process.pid)
        return self.servers[name]


def wrk_figures(text: str) -> dict[str, float]:
    """What wrk printed: requests, requests a second, latencies in ms by their share of the requests, bad replies."""
    units = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
    latencies = {
        f"p{share}": float(number) * units[unit] for share, number, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s|m)\b", text)
    }
    requests = int(re.search(r"(\d+) requests in", text)[1])  # type: ignore[index]
    per_second = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])  # type: ignore[index]
    bad = sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", text))
    bad += sum(map(int, re.findall(r"\b(?:connect|read|write|timeout) (\d+)", text)))
    return {"requests": requests, "per_second": per_second, "bad": bad} | latencies


def _key(database: str) -> str:
    store = Keys(database)
    try:
        prepare(store.engine, create=True)
        token, _ = store.create("benchmark", requests_per_minute=1_000_000, budget=1e6, window="month")
        return token
    finally:
        store.close()


def _ends(folder: Path) -> str:
    """The last lines that the servers said."""
    said = {path.stem: path.read_text()[-500:].strip() for path in folder.glob("*.log")}
    return "; ".join(f"{name} said: {text}" for name, text in said.items() if text)


def _litellm_environment() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deferral" / "litellm"
    python, marker = folder / "bin" / "python", folder / "installed"
    if not marker.is_file() or marker.read_text() != LITELLM:
        click.echo(f"installing {LITELLM} into {folder}, once", err=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITELLM], check=True)
        marker.write_text(LITELLM)
    return python


@contextmanager
def _process(command: list[str], **streams: int | IO[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process: subprocess.Popen[str] = subprocess.Popen(command, text=True, env=environment, **streams)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            # It answers, and that is all that is asked.
            return
        except OSError:
            time.sleep(0.1)
        if process.poll() is not None or time.monotonic() > until:
            raise click.ClickException(f"{url} did not come up: {process.args!r}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
