"""Real data as tensors: handwritten digits, CIFAR, SVHN, people's labels, regression tables.

`root` is one folder with `cifar-10-batches-py/`, `cifar-100-python/`, `*_32x32.mat`, `l2d/` for people's labels and `uci/` for
regression tables; the readers of these two take that folder.  Nothing here downloads or unpickles anything of its own.
"""

from deferral.datasets.files import NotFound
from deferral.datasets.images import Images, cifar10, cifar100, digits, svhn
from deferral.datasets.people import (
    Pathologists,
    Tweets,
    chaoyang,
    cifar10h_counts,
    cifar10n_annotators,
    cifar100n,
    hate_speech,
)
from deferral.datasets.regression import UCI, RegressionTable, uci
from deferral.errors import DataError

__all__ = [
    "UCI",
    "DataError",
    "Images",
    "NotFound",
    "Pathologists",
    "RegressionTable",
    "Tweets",
    "chaoyang",
    "cifar10",
    "cifar10h_counts",
    "cifar10n_annotators",
    "cifar100",
    "cifar100n",
    "digits",
    "hate_speech",
    "svhn",
    "uci",
]
