"""Predictor-rejector abstention on images, single and two stages.  python -m benchmarks predictor-rejector --preset laptop

Claim: the two-stage predictor-rejector loss has the lowest abstention loss, below score-based cross-entropy (Mozannar, Sontag
2020), generalised cross-entropy (Cao et al. 2022) and the single-stage pair with mae.  Published (Mao, Mohri, Zhong, ALT 2024,
Table 1; three runs), abstention loss in %:

                      SVHN, c = 0.03    CIFAR-10, c = 0.05    CIFAR-100, c = 0.15
    mu = 1            1.61 +- 0.06      4.48 +- 0.10          10.40 +- 0.10
    mu = 1.7          2.16 +- 0.04      3.62 +- 0.07          14.99 +- 0.01
    single stage, mae 2.22 +- 0.01      3.64 +- 0.05          14.99 +- 0.01
    two-stage         0.94 +- 0.02      3.31 +- 0.02           9.23 +- 0.03

14.99 at c = 0.15 is abstaining on everything.  The cells of mu = 1 and mu = 1.7 are those of `score-based`: whoever comes first
runs them.
"""

import click

from benchmarks import score_based
from benchmarks.harness.abstention import BASELINES, run_cells
from benchmarks.harness.presets import ABSTENTION
from benchmarks.harness.running import image_options, options, running

METHODS = (
    *BASELINES,
    "two-stage predictor-rejector",
    "single-stage predictor-rejector (mae)",
    "Mozannar-Sontag (mu=1)",
    "Cao et al. (mu=1.7)",
)
PUBLISHED = {  # (data, cost, method): % of abstention loss
    **score_based.PUBLISHED,
    ("svhn", "c=0.03", "single-stage predictor-rejector (mae)"): "2.22 ± 0.01",
    ("svhn", "c=0.03", "two-stage predictor-rejector"): "0.94 ± 0.02",
    ("cifar10", "c=0.05", "single-stage predictor-rejector (mae)"): "3.64 ± 0.05",
    ("cifar10", "c=0.05", "two-stage predictor-rejector"): "3.31 ± 0.02",
    ("cifar100", "c=0.15", "single-stage predictor-rejector (mae)"): "14.99 ± 0.01",
    ("cifar100", "c=0.15", "two-stage predictor-rejector"): "9.23 ± 0.03",
}


@click.command()
@options()
@image_options
@click.option("--data", type=click.Choice(["cifar10", "cifar100", "svhn"]), multiple=True, default=("cifar10", "cifar100"))
def command(data: tuple[str, ...], **given) -> None:
    """Predictor-rejector abstention on CIFAR-10, CIFAR-100 and, where its files are at hand, SVHN."""
    with running(**given, presets=ABSTENTION) as run:
        run_cells(run, METHODS, data)
