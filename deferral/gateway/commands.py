"""The command `deferral gateway`: it parses and prints, and decides nothing."""

from importlib import import_module

import click

from deferral.command_line import Commands
from deferral.gateway.key_commands import keys
from deferral.gateway.learning_commands import cascade, retrain
from deferral.gateway.record_commands import backup, export, forget
from deferral.gateway.report_commands import decisions, shadow, spending, status

__all__ = ["gateway"]

_ELSEWHERE = {
    "ask": "deferral.gateway.asking_commands",
    "check": "deferral.gateway.check_command",
    "grade": "deferral.gateway.asking_commands",
}


class _Commands(Commands):
    """Some import all that speaks HTTP; the other commands need not wait for that."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *_ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE:
            return getattr(import_module(_ELSEWHERE[name]), name)
        return super().get_command(context, name)


@click.group(cls=_Commands)
def gateway() -> None:
    """A gateway's first log, checks, API keys, record, retraining and status."""


for _command in (keys, forget, backup, export, retrain, cascade, spending, status, decisions, shadow):
    gateway.add_command(_command)
