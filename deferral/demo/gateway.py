"""The whole way of a routed question: two language models made on the spot, their endpoints, a router, the gateway before them.

The models learn from questions that no later step sees.  The router is fitted on their answers to some others, and judged on
yet others, all of which go through the gateway: once as the router decides, and once to each model by its name.
"""

import asyncio
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path

import aiohttp
import numpy as np
import torch
from rich.progress import Progress

from deferral.demo.distillation import LARGE, SMALL, train
from deferral.demo.language import LanguageModel, make_tokenizer, new_model
from deferral.demo.processes import endpoint, first_line, gateway
from deferral.demo.questions import KINDS, Question, is_right, questions
from deferral.demo.routed import PRICE_OF_ERROR, PRICES, Reply, Result, judged
from deferral.errors import DataError
from deferral.routing import Log, Outcome, Router, read_log, write_log

__all__ = ["cache_folder", "made_models", "running"]

TRAINING, FITTING = 20_000, 1_000  # questions that the models and the router learn from
MOST_QUESTIONS = 1_000  # that are asked through the gateway
_TEXTS_OF_TOKENIZER = 4_000
_AT_ONCE = 32


def cache_folder() -> Path:
    """Where the models stay from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deferral" / "demo-gateway"


@contextmanager
def running(folder: Path, count: int, seed: int, progress: Progress, *, port: int = 0) -> Iterator[tuple[Result, str]]:
    """Make what the folder lacks, and ask `count` questions, 1,000 at most, through the gateway.  -> the result, its base URL

    All servers end with the block.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # Drawn at once and whatever the count, so that none is ever in both.
    drawn = questions(FITTING + MOST_QUESTIONS, seed=seed)
    shuffled = [drawn[row] for row in np.random.default_rng(seed).permutation(len(drawn))]
    fitting, test = shuffled[:FITTING], shuffled[FITTING:][:count]
    sizes = made_models(folder, seed, progress, unseen=drawn)
    with ExitStack() as processes:
        task = progress.add_task("starting the endpoints", total=1)
        # Both start at the same time.
        starting = {name: processes.enter_context(endpoint(folder / name)) for name in PRICES}
        addresses = {name: first_line(process) for name, process in starting.items()}
        progress.advance(task)
        _fit_router(folder, fitting, addresses, progress)
        work = Path(processes.enter_context(tempfile.TemporaryDirectory(prefix="deferral-demo-")))
        (work / "experts.toml").write_text(_experts(addresses), encoding="utf-8")
        database = work / "gateway.db"
        url = processes.enter_context(gateway(folder / "router", work / "experts.toml", database, work / "log", port=port))
        replies = {
            model: _ask(test, url, model, progress, f"through the gateway, {said}")
            for model, said in (("auto", "as the router decides"), ("small", "always small"), ("large", "always large"))
        }
        asked = [reply.expert for reply in replies["auto"]]
        result = Result(test, judged(test, replies), asked, sizes, _rows_on_record(database), time.monotonic() - started)
        yield result, url


def made_models(folder: Path, seed: int, progress: Progress, *, unseen: Sequence[Question]) -> dict[str, int]:
    """Train what is not in the folder yet: the large model, then the small one from it.  -> the parameters of each"""
    recipe = {"large": asdict(LARGE), "small": asdict(SMALL), "rows": (TRAINING, FITTING), "seed": seed, "kinds": list(KINDS)}
    made_of = sha256(json.dumps([recipe, [question.text for question in unseen[:FITTING]]]).encode()).hexdigest()
    marker = folder / "recipe"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != made_of:
        # What is there was made otherwise.
        for name in ("large", "small", "router", "outcomes.jsonl"):
            _remove(folder / name)
        marker.write_text(made_of, encoding="utf-8")
    missing = [(name, made) for name, made in (("large", LARGE), ("small", SMALL)) if not (folder / name).is_dir()]
    if missing:
        data = questions(TRAINING, seed=seed + 1, exclude=frozenset(question.text for question in unseen))
    for name, made in missing:
        task = progress.add_task(f"training the {name} model", total=made.steps)
        if name == "large":
            tokenizer = make_tokenizer([f"{each.text} {each.answer}" for each in data[:_TEXTS_OF_TOKENIZER]])
            teacher = None
        else:
            large = LanguageModel.load(folder / "large")
            tokenizer, teacher = large.tokenizer, large.model
        network = new_model(width=made.width, layers=made.layers, heads=made.heads, seed=seed)
        train(network, tokenizer, data, made, partial(progress.advance, task), teacher=teacher, seed=seed)
        with _put_in_place(folder / name) as place:
            LanguageModel(network, tokenizer).save(place)
    return {name: LanguageModel.load(folder / name).parameters for name in PRICES}


def _fit_router(folder: Path, fitting: Sequence[Question], addresses: Mapping[str, str], progress: Progress) -> None:
    """Learn a router from both models' answers, unless the folder has one."""
    log = folder / "outcomes.jsonl"
    if not log.is_file():
        outcomes = Log()
        for name, address in addresses.items():
            replies = _ask(fitting, address, name, progress, f"asking the {name} model, for the router")
            for question, reply in zip(fitting, replies, strict=True):
                outcomes.append(Outcome(question.text, name, float(is_right(reply.text, question)), reply.dollars))
        write_log(outcomes, log)
        _remove(folder / "router")
    if not (folder / "router").is_dir():
        task = progress.add_task("fitting the router", total=1)
        torch.set_num_threads(1)
        Router(PRICE_OF_ERROR).fit(read_log(log)).save(folder / "router")
        progress.advance(task)


def _ask(asked: Sequence[Question], url: str, model: str, progress: Progress, doing: str) -> list[Reply]:
    return asyncio.run(_answers(asked, url, model, progress, doing))


async def _answers(asked: Sequence[Question], url: str, model: str, progress: Progress, doing: str) -> list[Reply]:
    task = progress.add_task(doing, total=len(asked))
    turn = asyncio.Semaphore(_AT_ONCE)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def one(question: Question) -> Reply:
            body = {"model": model, "messages": [{"role": "user", "content": question.text}]}
            async with turn, session.post(f"{url}/chat/completions", json=body) as response:
                reply = await response.json()
                if response.status != 200:
                    raise DataError(f"{url}: expected an answer of {model}, got status {response.status}: {reply}")
                expert = response.headers.get("x-deferral-expert", model)
            progress.advance(task)
            into, out = PRICES[expert]
            dollars = (reply["usage"]["prompt_tokens"] * into + reply["usage"]["completion_tokens"] * out) / 1e6
            return Reply(reply["choices"][0]["message"]["content"], expert, dollars)

        return list(await asyncio.gather(*map(one, asked)))


def _experts(addresses: Mapping[str, str]) -> str:
    tables = [
        f'[experts.{name}]\nbase_url = "{address}"\ninput_price = {PRICES[name][0]}\noutput_price = {PRICES[name][1]}\n'
        "context_tokens = 128\ntools = false\nimages = false\n"
        for name, address in addresses.items()
    ]
    return "\n".join(tables)


def _rows_on_record(database: Path) -> int:
    # Rows are written within 100 ms of the reply.
    time.sleep(0.5)
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("SELECT count(*) FROM decisions").fetchone()[0])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _put_in_place(path: Path) -> Iterator[Path]:
    """A place for a folder; what is there at the end takes the path at once, so that nothing half-made is ever found."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as work:
        partial = Path(work) / path.name
        yield partial
        os.replace(partial, path)
