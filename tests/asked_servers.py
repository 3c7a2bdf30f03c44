"""Servers that are asked a file of questions, and the files beside it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from deferral.gateway.answer_files import read_answers
from deferral.gateway.experts_file import Expert
from tests.served_app import served

__all__ = ["Scripted", "adding_experts", "additions", "experts_file", "lines_of", "says", "written"]


async def _add(request: Request) -> JSONResponse:
    """`large` adds, `small` adds what is below 10, and `judge` compares with the reference."""
    asked = await request.json()
    text = asked["messages"][-1]["content"]
    if asked["model"] == "judge":
        answer, right = (re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)[1].strip() for name in ("answer", "reference"))
        said = "I would rather not." if "99" in text else "<think>0 or 10?</think>9/10" if right in answer else "Grade: 2"
    else:
        total = sum(map(int, re.findall(r"\d+", text)))
        said = f"That makes {total}." if asked["model"] == "large" or total < 10 else "That is too much for me."
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return JSONResponse({"id": "x", "object": "chat.completion", "model": asked["model"], "choices": [choice], "usage": usage})


@contextmanager
def adding_experts() -> Iterator[dict[str, Expert]]:
    """small, large and judge, by name, on one server."""
    app = Starlette(routes=[Route("/v1/chat/completions", _add, methods=["POST"])])
    with served(app) as url:
        yield {
            name: Expert(name, url, input_price=price, output_price=price)
            for name, price in (("small", 1.0), ("large", 20.0), ("judge", 100.0))
        }


def additions(path: Path) -> Path:
    """1 + 1 .. 1 + 19, with references."""
    lines = [
        {"query": f"what is 1 and {number}?", "reference": 1 + number, "tags": "low" if number < 9 else ["high"]}
        for number in range(1, 20)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def experts_file(tmp_path: Path, experts: dict[str, Expert]) -> Path:
    path = tmp_path / "experts.toml"
    tables = [
        f'[experts.{name}]\nbase_url = "{each.base_url}"\ninput_price = {each.input_price}\noutput_price = {each.output_price}\n'
        f"route = {'false' if name == 'judge' else 'true'}\n"
        for name, each in experts.items()
    ]
    path.write_text("".join(tables))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [answer for _, answer in read_answers(path)]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def says(text: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}


class Scripted:
    """A server of one model that answers by what the question says."""

    def __init__(self, answer) -> None:
        app = Starlette(routes=[Route("/v1/chat/completions", self._one, methods=["POST"])])
        self.answer, self.asked = answer, []
        self._served = served(app)

    async def _one(self, request: Request) -> JSONResponse:
        self.asked.append((await request.json())["messages"][-1]["content"])
        status, body = self.answer(self.asked[-1])
        return JSONResponse(body, status)

    def __enter__(self) -> "Scripted":
        self._url = self._served.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._served.__exit__(*error)

    def expert(self, name: str = "one") -> Expert:
        return Expert(name, self._url, input_price=1e6, output_price=1e6)
