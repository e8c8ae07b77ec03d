"""``cloudlet-manage suspend``: before the machine is shut down."""

from __future__ import annotations

import argparse
import time

from cloudlet.cli.manage.command import ManageCommand
from cloudlet.cli.manage.database import opened
from cloudlet.cli.progress import progress_bar
from cloudlet.errors import FailedError
from cloudlet.service import shutdown

_LOOK_SECONDS = 0.2
_HEARD_SECONDS = 8.0


class Suspend(ManageCommand):
    """Suspend all instances before the machine is shut down; the next start of the service resumes them.

    The service must be running: it does the work, and this waits for it. Instances that are paused wait in a
    file for who paused them. Those whose lease has ended are not kept.

    Example: cloudlet-manage suspend --timeout 120
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--timeout", type=float, default=600.0, metavar="SECONDS",
            help="longest time to wait (default: 600)",
        )  # fmt: skip
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        with (
            opened(self.site_options.database_url) as database,
            progress_bar("suspending", quiet=self.app.quiet) as progress,
        ):
            began = time.monotonic()
            total = len(left := shutdown.still_running(database))
            shutdown.ask(database)
            while left := shutdown.still_running(database):
                progress(max(0, total - len(left)), total)
                waited = time.monotonic() - began
                if waited > parsed_args.timeout or (waited > _HEARD_SECONDS and not shutdown.heard(database)):
                    shutdown.take_back(database)
                    raise FailedError(
                        f"{len(left)} instances still run",
                        hint="is the service running? See its log, and give a longer --timeout",
                    )
                time.sleep(_LOOK_SECONDS)
        self.app.say(f"{total} instances are suspended" if total else "nothing runs")
