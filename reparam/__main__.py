"""``python -m reparam`` and the console script: start the command line, or say what it needs."""

from __future__ import annotations

import io
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status: 0 good, 1 differs or failed, 2 wrong usage, 130 interrupted."""
    # A table is worth more than the arrows in it, where the output has few characters.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        from reparam.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(f"The command line needs {error.name}, which is not installed: pip install 'reparam[cli]'")
    except KeyboardInterrupt:  # importing torch takes a while
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
