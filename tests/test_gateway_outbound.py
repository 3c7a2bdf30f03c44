"""The ways out of this machine: through a real proxy that the environment names, and not to whoever else is on the way."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from yarl import URL

from deferral.errors import DataError
from deferral.gateway.answering import Call, Unanswered
from deferral.gateway.connecting import proxy_of
from deferral.gateway.probe import probe
from tests.scripted_expert import asked, whole


def test_the_environment_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example,10.0.0.7,special.example:8443")
    for name in ("HTTP_PROXY", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_of(URL("https://api.example.com/v1")) == "http://proxy:3128"
    for direct in (
        "http://api.example.com/v1", "https://inside.example/v1", "https://gpu.inside.example/v1", "https://10.0.0.7:8000/v1",
        "https://localhost:8000/v1", "https://127.0.0.1:8000/v1", "https://[::1]:8000/v1", "https://special.example:8443/v1",
    ):  # fmt: skip
        assert proxy_of(URL(direct)) is None, direct
    assert proxy_of(URL("https://special.example/v1")) == "http://proxy:3128"


@pytest.mark.ci_slow
def test_experts_are_reached_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.0.0.0 is this machine too, and no address of its own that would be reached directly."""
    with _proxy(tmp_path, "user:secret") as port:
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)

        def ask(proxy: str, scheme: str = "http") -> tuple[Call | Exception, int]:
            for name in ("http_proxy", "https_proxy"):
                monkeypatch.setenv(name, proxy)
            (found,), requests = asked([[whole()]], address=f"{scheme}://0.0.0.0")
            return found, requests

        call, requests = ask(f"http://user:secret@127.0.0.1:{port}")
        assert isinstance(call, Call)
        assert (call.reply.status, call.reply.usage.output_tokens, requests) == (200, 3, 1)
        for scheme, proxy, message in (
            ("http", f"http://127.0.0.1:{port}", "refused the gateway with status 407"),
            ("https", f"http://127.0.0.1:{port}", "cannot be reached: its proxy refuses with status 407"),
            ("http", "http://127.0.0.1:1", "cannot be reached: its proxy does not answer"),
            ("http", "no proxy", "cannot be reached: the environment names a proxy by no URL"),
        ):
            failure, requests = ask(proxy, scheme)
            assert isinstance(failure, Unanswered)
            assert failure.message.startswith(f"small {message}")
            assert requests == 0


@contextmanager
def _proxy(folder: Path, credentials: str) -> Iterator[int]:
    """The port of a forward proxy that asks for credentials."""
    ports = folder / "ports"
    command = [sys.executable, "-m", "proxy", "--hostname", "127.0.0.1", "--port", "0", "--port-file", str(ports)]
    command += ["--num-workers", "1", "--num-acceptors", "1", "--basic-auth", credentials, "--data-dir", str(folder)]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while not (ports.is_file() and ports.read_text().strip()):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            yield int(ports.read_text())
        finally:
            process.terminate()


def test_the_admin_key_is_for_the_gateway_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a proxy on the way to this machine, nor for whom a reply leads to, nor for another server at the address."""
    with _listening({}) as elsewhere, _listening({"/ready": (200, '{"status": "ready"}')}) as gateway:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{elsewhere.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        gateway.replies["/metrics"] = (200, "# TYPE x gauge\nx 1\n")
        assert probe(gateway.url, "secret") == {"ready": "ready", "metrics": {"x": 1.0}}
        gateway.replies["/metrics"] = (302, elsewhere.url)
        assert probe(gateway.url, "secret") == {"ready": "ready", "metrics": {}}
        assert elsewhere.asked == []
        gateway.replies["/metrics"] = (200, '{"no": "metrics"}')
        with pytest.raises(DataError, match="/metrics does not answer as a gateway does"):
            probe(gateway.url, "secret")
        with pytest.raises(DataError, match="/ready does not answer as a gateway does"):
            probe(elsewhere.url, "secret")
        assert elsewhere.asked == [("/ready", None)]


class _Listening:
    """A server that answers what it is told to, and tells what it was asked, with which key."""

    def __init__(self, replies: dict[str, tuple[int, str]]) -> None:
        self.replies, self.asked = replies, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers["authorization"]))
                status, said = outer.replies.get(self.path, (404, "nothing here"))
                self.send_response(status)
                if status == 302:
                    self.send_header("location", said)
                self.end_headers()
                self.wfile.write(said.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"


@contextmanager
def _listening(replies: dict[str, tuple[int, str]]) -> Iterator[_Listening]:
    one = _Listening(replies)
    thread = threading.Thread(target=one.server.serve_forever)
    thread.start()
    try:
        yield one
    finally:
        one.server.shutdown()
        one.server.server_close()
        thread.join()
