"""Options that several commands of `deferral route` have, and what is meant by them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deferral.command_line import FiniteRange
from deferral.routing.cached_encoder import CachedEncoder
from deferral.routing.constraints import Needs
from deferral.routing.sentences import sentence_encoder

__all__ = [
    "FILE",
    "FOLDER",
    "NEW",
    "NEW_FOLDER",
    "POSITIVE",
    "encoder_of",
    "encoder_options",
    "setting_of",
    "setting_options",
]

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW = click.Path(path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
SHARE = FiniteRange(0, 1, min_open=True, max_open=True)
POSITIVE = FiniteRange(0, min_open=True)


def encoder_options(command: Callable) -> Callable:
    for option in (
        click.option("--cache", type=NEW, help="Folder that keeps the vectors of queries (with --encoder)."),
        click.option("--encoder", type=FOLDER, help="Folder of a sentence encoder.  [default: n-grams, which need no weights]"),
    ):
        command = option(command)
    return command


def setting_options(command: Callable) -> Callable:
    for option in (
        click.option("--deny", multiple=True, metavar="EXPERT", help="Never ask EXPERT; may be given several times."),
        click.option("--allow", multiple=True, metavar="EXPERT", help="Ask only EXPERT; may be given several times."),
        click.option("--region", "regions", multiple=True, help="Ask only experts of this region; may be given several times."),
        click.option("--images", is_flag=True, help="The query contains images."),
        click.option("--tools", is_flag=True, help="The query needs tools."),
        click.option(
            "--tokens",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="How many tokens the query has; experts with too small a context window are not asked.",
        ),
        click.option(
            "--max-latency", type=POSITIVE, help="Ask only experts whose mean latency_s in the log is at most so many seconds."
        ),
        click.option("--confidence", type=SHARE, default=0.95, show_default=True, help="Confidence of --certified-quality."),
        click.option("--certified-quality", type=SHARE, help="Promise this share of the best expert's quality."),
        click.option("--min-quality", type=FiniteRange(0, 1), help="The lowest mean quality that is acceptable."),
        click.option("--budget", type=POSITIVE, help="The most dollars per 1,000 queries, on average."),
        click.option("--price-of-error", type=POSITIVE, help="What a wrong answer is worth, in dollars."),
        click.option("--router", "-r", "folder", type=FOLDER, required=True, help="Folder of the router."),
    ):
        command = option(command)
    return command


def setting_of(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of `Router.plan` among the options of a command."""
    needs = Needs.of(
        tokens=options["tokens"],
        tools=options["tools"],
        images=options["images"],
        regions=options["regions"] or None,
        allow=options["allow"] or None,
        deny=options["deny"],
    )
    names = ("price_of_error", "budget", "min_quality", "certified_quality", "confidence", "max_latency")
    return {**{name: options[name] for name in names}, "needs": None if needs == Needs() else needs}


def encoder_of(folder: Path | None, cache: Path | None) -> Any:
    """The encoder that is meant by --encoder and --cache, None for n-grams."""
    if cache is not None and folder is None:
        raise click.UsageError("--cache needs --encoder: n-grams are computed faster than read")
    if folder is None:
        return None
    encoder = sentence_encoder(folder)
    return encoder if cache is None else CachedEncoder(encoder, cache, encoder.fingerprint)
