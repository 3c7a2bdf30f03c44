"""What the commands of all extras have in common."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from deferral.errors import DataError

__all__ = ["Command", "Commands", "FiniteRange", "callers_errors"]


class Command(click.Command):
    """Where a path stands alone that belongs to an option, the error says to which."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            option = error.param
            if not isinstance(option, click.Option) or not isinstance(option.type, click.Path):
                raise
            _, extra, _ = self.make_parser(ctx).parse_args(words)
            if not extra or (option.type.exists and not Path(extra[0]).exists()):
                raise
            said = f"{extra[0]} belongs to it: write {option.opts[-1]} {extra[0]}"
            raise click.MissingParameter(said, ctx, option) from None


class Commands(click.Group):
    """Its help says of each command a whole sentence, which click would cut where the line ends."""

    command_class = Command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(context, name)) for name in self.list_commands(context)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(200)) for name, one in commands if one is not None])


class FiniteRange(click.FloatRange):
    """A number in a range.  NaN is in none, but no comparison says so; infinity is in every range without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {number:g}", param, ctx)
        return number


@contextmanager
def callers_errors() -> Iterator[None]:
    """A setting that cannot be met is an error of the caller's: said in one line."""
    try:
        yield
    except DataError:
        # Said in one line anyway, by whoever runs the command.
        raise
    except ValueError as error:
        raise click.ClickException(str(error)) from error
