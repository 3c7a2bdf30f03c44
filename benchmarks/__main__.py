"""python -m benchmarks NAME [options]: runs one of the scripts beside this file."""

import ast
import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def usage() -> str:
    """A line for each script: the first of its docstring, without its command."""
    lines = [f"  {name.replace('_', '-'):20} {about(name)}" for name in NAMES]
    return "\n".join(["usage: python -m benchmarks NAME [options]; --help after a name has its options", *lines])


def about(name: str) -> str:
    """What a script is for.  Read, not imported: that would take many seconds."""
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.partition("python -m")[0].partition("\n")[0].strip().rstrip(".:")


def main() -> None:
    """Hand over to the named script's `main`."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name in ("__help", "_h"):
        print(usage())
        return
    if name not in NAMES:
        sys.exit(usage())
    importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])


main()
