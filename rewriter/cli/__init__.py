"""The command line; every file of this folder that is no helper holds one command.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

from rewriter.cli.shared import app
from rewriter.errors import RewriterError

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")


def main() -> None:
    """Entry point of the `rewriter` command."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake prints one message."""
    try:
        app(arguments, prog_name="rewriter")
    except SystemExit as done:  # typer always leaves this way
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RewriterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # disk full, no permission, the hub out of reach
        what = error.strerror or str(error).strip() or type(error).__name__
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {what}{where}", file=sys.stderr)
        return 2
    except Exception:
        import traceback

        traceback.print_exc()
        print("internal error: this is a bug in rewriter", file=sys.stderr)
        return 1
    return 0
