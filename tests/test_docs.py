"""The generated pages are current, and every loss says what a reader needs."""

import inspect
import re

import pytest

from benchmarks import api_page
from benchmarks.loss_table import CLAIMS, PAGE, page
from deferral import losses


def test_the_table_of_losses_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks loss-table"


def test_the_list_of_names_is_current() -> None:
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run python -m benchmarks api-page"


def test_pages_hold_no_control_characters() -> None:
    for path in [*PAGE.parent.glob("*.md"), *PAGE.parent.parent.glob("*.md")]:
        # A NUL makes a page binary to git and grep.
        assert min(path.read_text(encoding="utf-8").replace("\n", " ")) >= " ", path


def test_the_table_lists_every_loss() -> None:
    assert set(CLAIMS) == set(losses.__all__) - {"Criterion", "expert_correctness", "rejector_of_scores"}


@pytest.mark.parametrize("name", sorted(set(losses.__all__) - {"Criterion"}))
def test_every_loss_has_a_formula_shapes_and_a_source(name: str) -> None:
    text = inspect.getdoc(getattr(losses, name)) or ""
    assert re.search(r"-> \([^()]*\)$", text.splitlines()[0]), "the first line ends with shapes"
    assert re.search(r"\b(19|20)\d\d\b", text), "a paper's year in its own docstring"
