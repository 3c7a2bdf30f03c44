"""python -m benchmarks NAME [options]: runs one of the scripts beside this file."""

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    """Hand over to the named script's `main`."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name not in NAMES:
        sys.exit(f"usage: python -m benchmarks NAME [options]; expected NAME to be one of: {', '.join(NAMES).replace('_', '-')}")
    importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])


main()
