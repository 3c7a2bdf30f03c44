import os
from pathlib import Path

import pytest
import torch

# On a shared machine torch's default threads slow small tensors down twentyfold.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data, or a skip that says how to get the test to run."""
    root = os.environ.get("DEFERRAL_DATA")
    if not root:
        pytest.skip("real data: set DEFERRAL_DATA to the folder that holds cifar-10-batches-py/ and l2d/")
    return Path(root)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
