"""Two-stage deferral to 1 to 16 simulated experts on images.  python -m benchmarks two-stage --preset laptop

Claim: with the predictor fixed, a router trained by the two-stage surrogates learns whom to ask, at a fraction of the work (Mao,
Mohri, Mohri, Zhong, "Two-Stage Learning to Defer with Multiple Experts", NeurIPS 2023; CIFAR-10 and SVHN).  Published figures:
not available to us.

Weights ceiling - cost with mu = 1, 1.7 and 2 (the last starts from the realizable router), the row's sum as ceiling, and
compare-confidence and post-hoc deferral.  The experts are those of `multi-expert`, and so are the cells of single-stage mu = 1.
"""

import click

from benchmarks.harness.asking import BASELINES
from benchmarks.harness.running import image_options, options, running
from benchmarks.harness.simulated import run_cells

METHODS = (
    *BASELINES,
    "two-stage mu=1",
    "two-stage mu=1, weights of the sum",
    "two-stage mu=1.7",
    "two-stage mu=2",
    "compare-confidence",
    "post-hoc deferral",
    "single-stage mu=1",
)


@click.command()
@options()
@image_options
@click.option("--data", type=click.Choice(["cifar10", "svhn"]), multiple=True, default=("cifar10",), show_default=True)
def command(data: tuple[str, ...], **given) -> None:
    """Two-stage deferral to several simulated experts."""
    with running(**given) as run:
        run_cells(run, METHODS, data)
