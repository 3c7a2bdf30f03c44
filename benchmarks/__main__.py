"""python -m benchmarks NAME [options]: runs one of the scripts beside this file."""

import ast
import importlib
import sys
from difflib import get_close_matches
from pathlib import Path

from deferral.errors import DataError

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
    """Hand over to the named script's `command`."""
    said = sys.argv[1] if len(sys.argv) > 1 else "--help"
    name = said.replace("-", "_")
    if said in ("--help", "-h"):
        print(usage())
        return
    if name not in NAMES:
        near = [f"did you mean {one.replace('_', '-')}?" for one in get_close_matches(name, NAMES, 1)]
        print(f"Error: there is no benchmark {said!r}; {near[0] if near else 'python -m benchmarks lists them'}", file=sys.stderr)
        sys.exit(2)
    arguments = ["--help" if word == "-h" else word for word in sys.argv[2:]]
    try:
        script = importlib.import_module(f"benchmarks.{name}")
        script.command.main(arguments, prog_name=f"python -m benchmarks {name.replace('_', '-')}")
    except KeyboardInterrupt:
        # While it is imported, which takes seconds; after that click and the harness tell it.
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (DataError, ImportError, OSError) as error:
        what = getattr(error, "what", None)  # of NotFound
        sys.exit(f"Error: {what}; --root, or DEFERRAL_DATA, names the folder of all data" if what else f"Error: {error}")


main()
