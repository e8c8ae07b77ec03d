"""The program ``cloudlet``: where it begins and where it ends.

The commands are loaded last, since that takes a third of a second in which a signal has to be heard
too. What they share is in ``command.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cloudlet.cli import signals
from cloudlet.errors import ExitCode

if TYPE_CHECKING:
    from cloudlet.cli.command import CloudletApp


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as ``errors.py`` lists them."""
    return run(_application, arguments)


def run(application: Callable[[], CloudletApp], arguments: Sequence[str] | None) -> int:
    """Run a command line with the application that is made when signals are heard."""
    signals.leave()
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(application().run(argv or ["help"]))
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    finally:
        signals.ignore()


def _application() -> CloudletApp:
    from cloudlet.cli.command import CloudletApp

    return CloudletApp()


if __name__ == "__main__":
    sys.exit(main())
