"""Arrows never turn back, and the core needs torch and numpy alone."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deferral

PACKAGE = Path(__file__).parent.parent / "deferral"
# From the bottom up; a module may import from its own layer and those before it.
LAYERS = [
    ["arrays", "errors", "labels", "numerics", "command_line", "strict_json", "threads", "validation", "whole_files"],
    ["losses", "costs", "decision"],
    ["metrics", "curves", "reliability", "intervals", "printed", "experts", "testing"],
    ["calibration", "capacity", "certified", "baselines"],
    ["plots", "torchvision_compat", "datasets", "estimators"],
    ["evaluation", "routing"],
    ["gateway"],
    ["demo"],
    ["cli", "__main__"],
]


def test_the_core_loads_nothing_but_torch_and_numpy_and_what_they_need() -> None:
    program = """
import sys
import numpy, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(name)
allowed = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | {"deferral"}
sys.meta_path.insert(0, Blocked())
from deferral import *
import deferral
assert all(getattr(deferral, name) for name in deferral._MODULES)
for name in [name for name in sys.modules if name.partition(".")[0] == "deferral"]:
    del sys.modules[name]
# Again, with nothing imported before.
import deferral
assert all(getattr(deferral, name).__name__ == f"deferral.{name}" for name in deferral._MODULES)
assert "metrics" in dir(deferral) and "import_module" not in dir(deferral)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_whoever_only_routes_holds_neither_torch_nor_scikit_learn_in_memory() -> None:
    heavy = {"torch", "sklearn", "scipy", "pyarrow"}
    program = f"import sys, deferral.cli, deferral.routing.batches; sys.exit(' '.join({heavy} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_commands_that_need_no_torch_do_not_load_it() -> None:
    called = "from deferral.cli import main; [main(['route', *of, '--help']) for of in ([], ['batch'], ['export-encoder'])]"
    program = f"import sys; {called}; sys.exit(' '.join({{'torch'}} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there_when_asked_for() -> None:
    named = [name for names in deferral._HOMES.values() for name in names]
    assert sorted(named) == deferral.__all__
    assert all(getattr(deferral, name).__name__ == name for name in deferral.__all__)
    with pytest.raises(AttributeError, match="no attribute 'decides'"):
        deferral.decides  # noqa: B018


def imported(path: Path) -> set[str]:
    """The deferral modules that a file imports at any level, by their name under the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("deferral."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "deferral":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("deferral."))
    return names


def test_every_module_has_a_layer_and_imports_only_downwards() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in level, f"{path} has no layer"
        too_high = {name for name in imported(path) if level[name] > level[own]}
        assert not too_high, f"{path} imports {too_high}"


def test_no_two_files_need_each_other_not_even_for_their_types() -> None:
    files = {".".join(("deferral", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")}
    needs = {}
    for name, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
        named = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {str(node.module) for node in nodes}
        needs[name] = named & set(files)
    TopologicalSorter(needs).prepare()


def test_what_other_files_import_is_public() -> None:
    public, wanted = {}, []
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("deferral", *path.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "__all__"
                and isinstance(node.value, ast.List)
            ):
                public[name] = set(ast.literal_eval(node.value))
            elif isinstance(node, ast.ImportFrom):
                wanted += [(str(node.module), alias.name) for alias in node.names]
    assert len(public) > 150
    assert not [(module, name) for module, name in wanted if name not in public.get(module, {name})]


def test_no_module_of_the_package_is_named_after_nothing() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in {"utils", "common", "base", "helpers"}]
