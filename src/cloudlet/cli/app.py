"""The program ``cloudlet``: where it begins and where it ends.

The commands are loaded last, since that takes a third of a second in which a signal has to be heard
too. What they share is in ``command.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cloudlet.cli import signals
from cloudlet.errors import ExitCode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as ``errors.py`` lists them."""
    signals.leave()
    from cloudlet.cli.command import CloudletApp

    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(CloudletApp().run(argv or ["help"]))
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    finally:
        signals.ignore()


if __name__ == "__main__":
    sys.exit(main())
