"""Single-stage deferral to 1 to 16 simulated experts on images.  python -m benchmarks multi-expert --preset laptop

Claim: one network that answers or names an expert learns whom to ask among several (Mao, Mohri, Zhong, "Principled Approaches
for Learning to Defer with Multiple Experts", ISAIM 2024; CIFAR-10 and SVHN).  Published figures: not available to us.  Older
losses are known to lose system accuracy at 16 to 20 experts; each row shows a method over the number of experts.

`single-stage mu=1` is also Verma et al. 2023's softmax loss; one-vs-all (Verma et al. 2023), the mixture of experts (Hemmer et
al. 2022) and PiCCE (2026) are the published rivals.  Heads on the features of a network that they share; who the experts are
is fixed in harness/simulated.py.  System accuracy is 1 - error; at a price of 0 the cost is the error.  one-vs-all, PiCCE, the
mixture of experts and realizable q=1 are trained without knowing the price: where there is one, their fitted threshold alone
knows it.
"""

import click

from benchmarks.harness.asking import BASELINES
from benchmarks.harness.running import image_options, options, running
from benchmarks.harness.simulated import run_cells

METHODS = (
    *BASELINES,
    "single-stage mu=1",
    "single-stage mu=1.7",
    "realizable q=1",
    "one-vs-all",
    "PiCCE",
    "mixture of experts",
)


@click.command()
@options()
@image_options
@click.option("--data", type=click.Choice(["cifar10", "svhn"]), multiple=True, default=("cifar10",), show_default=True)
def command(data: tuple[str, ...], **given) -> None:
    """Single-stage deferral to several simulated experts."""
    with running(**given) as run:
        run_cells(run, METHODS, data)
