"""python -m deferral: the command of the same name."""

from deferral.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
