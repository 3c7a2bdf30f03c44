"""What the commands of all extras have in common."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
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
    """Its help says of each command a whole sentence, which click would cut where the line ends.

    `elsewhere` has the module and that sentence of each command that is imported when it is called: the others and the help
    need neither wait for what it needs nor have it installed.
    """

    command_class = Command

    def __init__(self, *given: Any, elsewhere: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.elsewhere = elsewhere

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *self.elsewhere])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in self.elsewhere:
            module, _ = self.elsewhere[name]
            return getattr(import_module(module), name)
        return super().get_command(context, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        said = {name: command.get_short_help_str(200) for name, command in self.commands.items()}
        said |= {name: sentence for name, (_, sentence) in self.elsewhere.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(said.items()))


class FiniteRange(click.FloatRange):
    """A number in a range.  NaN is in none, but no comparison says so; infinity is in every range without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {number:g}", param, ctx)
        return number


@contextmanager
def callers_errors(kind: type[click.ClickException] = click.ClickException) -> Iterator[None]:
    """A setting that cannot be met is an error of the caller's: said in one line, UsageError with the command's usage."""
    try:
        yield
    except DataError:
        # Said in one line anyway, by whoever runs the command.
        raise
    except ValueError as error:
        raise kind(str(error)) from error
