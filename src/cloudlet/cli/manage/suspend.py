"""``cloudlet-manage suspend``: before the machine is shut down."""

from __future__ import annotations

import argparse
import time

from cloudlet.cli.manage.command import ManageCommand
from cloudlet.cli.manage.database import opened
from cloudlet.cli.progress import progress_bar
from cloudlet.errors import FailedError
from cloudlet.service import shutdown
from cloudlet.store.database import Database

_LOOK_SECONDS = 0.2
_HEARD_SECONDS = 20.0


class Suspend(ManageCommand):
    """Suspend all instances before the machine is shut down; the next start of the service resumes them.

    The service must be running: it does the work, and this waits for it. Instances that are paused wait in a
    file for who paused them. Those whose lease has ended are not kept. New instances are refused until the
    machine has been started again, or --off takes it back.

    Example: cloudlet-manage suspend --timeout 120
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--timeout", type=float, default=600.0, metavar="SECONDS",
            help="longest time to wait (default: 600)",
        )  # fmt: skip
        parser.add_argument("--off", action="store_true", help="take it back: they are resumed now")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        with opened(self.site_options.database_url) as database:
            if parsed_args.off:
                shutdown.take_back(database)
                self.app.say("what was suspended is resumed, as soon as the service runs")
                return
            try:
                total = self._suspend(database, parsed_args.timeout)
            except BaseException:
                shutdown.take_back(database)
                raise
        said = f"{_instances(total, 'is', 'are')} suspended" if total else "nothing runs"
        self.app.say(said)

    def _suspend(self, database: Database, timeout: float) -> int:
        """Have all suspended, and wait for it; how many."""
        began = time.monotonic()
        total = len(shutdown.still_running(database))
        shutdown.ask(database)
        with progress_bar("suspending", quiet=self.app.quiet) as progress:
            while left := shutdown.still_running(database):
                progress(max(0, total - len(left)), total)
                waited = time.monotonic() - began
                if waited > timeout or (waited > _HEARD_SECONDS and not shutdown.heard(database)):
                    raise FailedError(
                        _instances(len(left), "still runs", "still run"),
                        hint="is the service running? See its log, and give a longer --timeout",
                    )
                time.sleep(_LOOK_SECONDS)
        return total


def _instances(number: int, does: str, do: str) -> str:
    """So many instances, and what they do."""
    return f"1 instance {does}" if number == 1 else f"{number} instances {do}"
