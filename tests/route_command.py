"""`deferral route`, called; a log for it, and a router."""

from pathlib import Path

from click.testing import CliRunner, Result

from deferral import cli
from deferral.routing import Log, Outcome, Router
from tests.routing_world import EXPERTS, QUICK, world


def outcomes(rows: int, seed: int, mark: str = "") -> Log:
    texts, subject, quality, price = world(rows, seed=seed)
    return Log(
        Outcome(f"{text}{mark}", name, quality[i, j], price[i, j], output_tokens=10, tags=(f"subject {subject[i]}",))
        for i, text in enumerate(texts)
        for j, name in enumerate(EXPERTS)
    )


def saved_router(folder: Path) -> Path:
    Router(0.1, policies=QUICK).fit(outcomes(300, 0), certify=0.3).save(folder)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, ["route", *map(str, arguments)], catch_exceptions=False)
