"""`transformers serve`, a server that others wrote, behind the gateway: chat, stream, models."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import openai
import pytest

from deferral.gateway.experts_file import Expert
from deferral.gateway.settings import Settings
from tests.running_gateway import EASY, RunningGateway, small_router

pytestmark = pytest.mark.slow

# transformers imports torchvision where there is one, and ends where that one is broken.
SERVE = """
from importlib.util import find_spec
from deferral.torchvision_compat import import_torchvision
if find_spec("torchvision"):
    import_torchvision()
from transformers.cli.transformers import main
main()
"""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Base URL and model of a server of a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("transformers")
    from deferral.demo.language import LanguageModel, make_tokenizer, new_model
    from deferral.demo.questions import questions

    model = folder / "tiny"
    tokenizer = make_tokenizer([f"{each.text} {each.answer}" for each in questions(300, seed=0)])
    LanguageModel(new_model(width=32, layers=2, heads=4, seed=0), tokenizer).save(model)
    # Without this folder GET /v1/models fails.
    (folder / "home" / "hub").mkdir(parents=True)
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.kill()
        process.wait()


def test_chat_stream_and_models_through_the_gateway(upstream: tuple[str, Path], tmp_path: Path) -> None:
    url, model = upstream
    experts = {name: Expert(name, url, model=str(model), input_price=1, output_price=2) for name in ("small", "large")}
    messages = [{"role": "user", "content": EASY}]
    with (
        RunningGateway(small_router(), experts, Settings(database=str(tmp_path / "gateway.db"))) as gateway,
        openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0, timeout=60) as client,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as direct,
    ):
        asked = {"messages": messages, "max_tokens": 8, "temperature": 0.0}
        raw = client.chat.completions.with_raw_response.create(model="auto", **asked)
        answer = raw.parse()
        expected = direct.chat.completions.create(model=str(model), **asked)
        assert raw.headers["x-deferral-expert"] == "small"
        assert answer.choices[0].message.content == expected.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage == expected.usage
        chunks = list(client.chat.completions.create(model="auto", stream=True, **asked))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == answer.choices[0].message.content
        assert [each.id for each in client.models.list()] == ["auto", "small", "large"]
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as connection:
        rows = connection.execute(
            "select expert, outcome, streamed, estimated, input_tokens, output_tokens from decisions"
        ).fetchall()
    whole, stream = rows
    assert whole == ("small", "ok", 0, 0, answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert stream[:3] == ("small", "ok", 1)
