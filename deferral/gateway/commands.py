"""The command `deferral gateway`: it parses and prints, and decides nothing."""

import click

from deferral.command_line import Commands
from deferral.gateway.key_commands import keys
from deferral.gateway.learning_commands import cascade, retrain
from deferral.gateway.record_commands import backup, export, forget
from deferral.gateway.report_commands import decisions, shadow, spending, status

__all__ = ["gateway"]

# Commands that ask experts: their HTTP client is imported when one of them is called.
_ELSEWHERE = {
    "ask": (
        "deferral.gateway.asking_commands",
        "Ask every expert every question in QUESTIONS, and add the answers to ANSWERS (.jsonl); `grade` makes a log of them.",
    ),
    "check": (
        "deferral.gateway.check_command",
        "Look at all that `deferral serve` needs with the same options, before it goes live, and change nothing.",
    ),
    "grade": (
        "deferral.gateway.asking_commands",
        "Say how good each answer is, and write the log that `deferral route fit` learns from (.jsonl, .ndjson or .parquet).",
    ),
}


@click.group(cls=Commands, elsewhere=_ELSEWHERE)
def gateway() -> None:
    """A gateway's first log, checks, API keys, record, retraining and status."""


for _command in (keys, forget, backup, export, retrain, cascade, spending, status, decisions, shadow):
    gateway.add_command(_command)
