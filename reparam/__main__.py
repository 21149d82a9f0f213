"""``python -m reparam`` and the console script: start the command line, or say what it needs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status: 0 good, 1 differs or failed, 2 wrong usage."""
    try:
        from reparam.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(f"The command line needs {error.name}, which is not installed: pip install 'reparam[cli]'")
    app()


if __name__ == "__main__":
    main()
