"""The commands `deferral gateway` and `deferral serve`."""

import click

__all__ = ["gateway"]


@click.group()
def gateway() -> None:
    """Keys, record, retraining and status of a gateway."""
