"""An OpenAI-compatible server around one tiny language model, on loopback: python -m deferral.demo.endpoint FOLDER

Chat completions, JSON and SSE, with usage and the log-probabilities of the answer's own tokens, which `transformers serve` does
not report.  Requests that wait are answered side by side.  Prints its base URL when it is ready, and ends when its standard
input does, so that it never outlives the process that started it.
"""

import argparse
import asyncio
import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deferral.demo.language import ROLES, LanguageModel, Sampling, Step, TooLong
from deferral.demo.processes import end_with_standard_input

__all__ = ["app"]

MOST_AT_ONCE = 64
MOST_ALTERNATIVES = 20


@dataclass
class _Job:
    prompt: list[int]
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    steps: asyncio.Queue[Step | Exception] = field(default_factory=asyncio.Queue)

    def tell(self, step: Step | Exception) -> None:
        # The loop is closed where the server ends while an answer is being written.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.steps.put_nowait, step)


class _Writer:
    """A thread that answers whatever waits, up to 64 requests side by side."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="writer", daemon=True).start()

    def start(self, prompt: list[int], sampling: Sampling) -> _Job:
        job = _Job(prompt, sampling, asyncio.get_running_loop())
        self._waiting.put(job)
        return job

    def _run(self) -> None:
        while True:
            jobs = [self._waiting.get()]
            while len(jobs) < MOST_AT_ONCE and not self._waiting.empty():
                jobs.append(self._waiting.get())
            try:
                for row, step in self.model.steps([job.prompt for job in jobs], [job.sampling for job in jobs]):
                    jobs[row].tell(step)
            except Exception as error:  # whatever it is, those who wait must hear of it
                for job in jobs:
                    job.tell(error)


def app(model: LanguageModel, name: str) -> Starlette:
    """The server of a model under a name."""
    writer = _Writer(model)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "deferral"}]})

    async def chat(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
            prompt, sampling = model.prompt(_messages(body)), _sampling(body)
        except TooLong as error:
            return _refused(str(error), "context_length_exceeded")
        except ValueError as error:
            return _refused(str(error), "invalid_request_error")
        job = writer.start(prompt, sampling)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        told = bool(body.get("logprobs"))
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_events(job, head, told, usage), media_type="text/event-stream")
        steps = [step async for step in _steps(job)]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(step.text for step in steps)},
            "logprobs": {"content": [_token(step) for step in steps if step.text]} if told else None,
            "finish_reason": steps[-1].finish,
        }
        counts = _usage(prompt, steps)
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": counts})

    return Starlette(
        routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])],
    )


async def _steps(job: _Job) -> AsyncIterator[Step]:
    while True:
        step = await job.steps.get()
        if isinstance(step, Exception):
            raise step
        yield step
        if step.finish:
            return


async def _events(job: _Job, head: dict[str, Any], told: bool, usage: bool) -> AsyncIterator[bytes]:
    head = head | {"object": "chat.completion.chunk"}

    def event(delta: dict[str, str], finish: str | None = None, token: Step | None = None) -> bytes:
        logprobs = {"content": [_token(token)]} if token is not None and told else None
        return _event(head | {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]})

    yield event({"role": "assistant", "content": ""})
    steps = []
    async for step in _steps(job):
        steps.append(step)
        if step.text:
            yield event({"content": step.text}, token=step)
    yield event({}, steps[-1].finish)
    if usage:
        yield _event(head | {"choices": [], "usage": _usage(job.prompt, steps)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _token(step: Step) -> dict[str, Any]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return one(step.text, step.logprob) | {"top_logprobs": [one(*other) for other in step.alternatives]}


def _usage(prompt: list[int], steps: list[Step]) -> dict[str, int]:
    # The end is a token that was written, too.
    return {"prompt_tokens": len(prompt), "completion_tokens": len(steps), "total_tokens": len(prompt) + len(steps)}


def _messages(body: Any) -> list[dict[str, str]]:
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    found = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        if not isinstance(content, str) or message.get("role") not in ROLES:
            raise ValueError(f"messages: expected a role of {', '.join(ROLES)} and a text as content")
        found.append({"role": message["role"], "content": content})
    return found


def _sampling(body: dict[str, Any]) -> Sampling:
    def given(default: Any, *names: str) -> Any:
        return next((body[name] for name in names if body.get(name) is not None), default)

    most = given(Sampling.most_tokens, "max_completion_tokens", "max_tokens")
    temperature, seed = given(0.0, "temperature"), given(0, "seed")
    alternatives = given(0, "top_logprobs") if body.get("logprobs") else 0
    if not _whole(most) or most < 1:
        raise ValueError(f"max_tokens: expected a whole number, 1 or more, got {most!r}")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise ValueError(f"temperature: expected a number in [0, 2], got {temperature!r}")
    if not _whole(seed):
        raise ValueError(f"seed: expected a whole number, got {seed!r}")
    if not _whole(alternatives) or not 0 <= alternatives <= MOST_ALTERNATIVES:
        raise ValueError(f"top_logprobs: expected a whole number from 0 to {MOST_ALTERNATIVES}, got {alternatives!r}")
    return Sampling(most, float(temperature), seed % 2**63, alternatives)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=400)


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", help="of the model; by default that of the folder")
    parser.add_argument("--port", type=int, default=0, help="by default one that is free")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LanguageModel.load(options.folder)
    listening = socket.create_server(("127.0.0.1", options.port))

    @asynccontextmanager
    async def ready(served: Starlette) -> AsyncIterator[None]:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", flush=True)
        yield

    served = app(model, options.name or options.folder.name)
    served.router.lifespan_context = ready

    end_with_standard_input()
    server = uvicorn.Server(uvicorn.Config(served, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
