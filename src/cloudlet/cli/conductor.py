"""The program ``cloudlet-conductor``: does the long work of a site whose settings name a job board.

It takes operations from the board, beside other conductors, and one of them keeps house: leases, webhooks,
machines that ended. All run on the machine where the site's instances are.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from oslo_log import log
from prometheus_client import start_http_server

import cloudlet
from cloudlet.cli import logs, signals
from cloudlet.cli.exclusive import only_server
from cloudlet.errors import CloudletError, ConflictError, ExitCode, UsageError, of_the_system
from cloudlet.service.options import Listening, Options, read_options
from cloudlet.service.site import ServedSite
from cloudlet.settings import read_files, settings_of

LOG = log.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as ``errors.py`` lists them."""
    signals.leave()
    asked = _parser().parse_args(arguments)
    try:
        _conduct(asked.config_file, quiet=asked.quiet)
    except (CloudletError, OSError, MemoryError) as error:
        ours = error if isinstance(error, CloudletError) else of_the_system(error)
        print(f"cloudlet-conductor: {ours}", file=sys.stderr)
        return ours.exit_code
    sys.stderr.flush()
    # What is being worked on stays as it is, for another conductor; nobody waits here until it is done.
    os._exit(ExitCode.DONE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cloudlet-conductor",
        description="Do the long work of a site: take operations from the job board that [work] job_board "
        "names. Start as many as there is work for; kill any of them at any time.",
    )
    parser.add_argument("--config-file", metavar="FILE", help="read the settings from this file")
    parser.add_argument("-q", "--quiet", action="store_true", help="log only warnings and errors")
    parser.add_argument("--version", action="version", version=f"cloudlet-conductor {cloudlet.__version__}")
    return parser


def _conduct(config_file: str | None, *, quiet: bool) -> None:
    options = _options(config_file)
    if not options.job_board:
        raise UsageError(
            "no job board is configured", hint="set [work] job_board to redis://127.0.0.1:6379/0, or such"
        )
    logs.begin(config_file, quiet=quiet)
    ended = threading.Event()
    with only_server(options.machine.state_dir, shared=True):
        site = ServedSite.open(options, conducts=True)
        try:
            if options.metrics:
                _show_figures(site, options.metrics)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: ended.set())
            signal.signal(signal.SIGHUP, lambda *_: _reload(site, config_file))
            ended.wait()
        finally:
            site.close()


def _options(config_file: str | None) -> Options:
    conf = read_files(config_file)
    return read_options(conf, settings_of(conf))


def _reload(site: ServedSite, config_file: str | None) -> None:
    with suppress(CloudletError):
        site.reload(_options(config_file))
        LOG.info("limits and leases were read again")


def _show_figures(site: ServedSite, at: Listening) -> None:
    try:
        start_http_server(at.port, at.host, site.meters.registry)
    except OSError as error:
        raise ConflictError(f"cannot listen at {at.host}:{at.port}: {error}", hint="name another") from error


if __name__ == "__main__":
    sys.exit(main())
