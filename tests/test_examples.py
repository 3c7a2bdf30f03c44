"""Every example runs as its docstring says, in a folder of its own, and defers at a lower cost than never and than always.

`./scripts/test --examples` runs all of them; elsewhere those whose framework is not installed are skipped.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"(\d\.\d+)"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAST_LINE = re.compile(
    rf"deferral cost {NUMBER} \(never \w+ {NUMBER}, always {NUMBER}\), coverage {NUMBER}, accuracy of kept rows {NUMBER}"
)
CASES = [  # script, how it is started, what it needs beside torch
    ("plain_loop.py", (), ("sklearn",)),
    ("ddp.py", TORCHRUN, ("sklearn",)),
    ("lightning_module.py", (), ("sklearn", "lightning")),
    ("skorch_net.py", (), ("sklearn", "skorch")),
    ("huggingface_trainer.py", (), ("transformers", "accelerate")),
]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@functools.cache
def unfit_torchvision() -> bool:
    """Whether a torchvision is installed that does not fit torch, which transformers and Lightning then fail to import."""
    return importlib.util.find_spec("torchvision") is not None and run(Path.cwd(), "-c", "import torchvision").returncode != 0


@pytest.mark.parametrize(("script", "start", "needs"), CASES, ids=[script for script, _, _ in CASES])
def test_deferring_costs_less_than_never_and_than_always(
    script: str, start: tuple[str, ...], needs: tuple[str, ...], tmp_path: Path
) -> None:
    for module in needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"examples/{script} needs {module}: ./scripts/test --examples")
    if unfit_torchvision() and {"lightning", "transformers"} & set(needs):
        pytest.skip(f"examples/{script} imports torchvision, which does not fit the torch here: ./scripts/test --examples")
    done = run(tmp_path, *start, str(EXAMPLES / script))
    assert done.returncode == 0, done.stderr
    printed = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert printed, done.stdout
    cost, never, always, coverage, accuracy = map(float, printed.groups())
    assert cost < min(never, always)
    assert 0.2 < coverage < 0.9
    assert accuracy > 1 - never
    assert done.stdout.count("deferral cost") == 1
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_ddp_from_plain_python_says_how_to_start_it(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="examples/ddp.py needs sklearn: ./scripts/test --examples")
    done = run(tmp_path, str(EXAMPLES / "ddp.py"))
    assert done.returncode == 1
    assert "torchrun --standalone --nproc-per-node 2 examples/ddp.py" in done.stderr


def test_every_example_is_run_and_is_short_enough_to_copy() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {script for script, _, _ in CASES}
    for name, text in scripts.items():
        assert 25 <= len(text.splitlines()) <= 60, name
        assert f"examples/{name}`" in text, f"{name} says how to run it"
