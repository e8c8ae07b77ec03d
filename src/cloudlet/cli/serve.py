"""``cloudlet serve``: make this machine a cloudlet, until it is told to end."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from oslo_log import log

from cloudlet.api import identity
from cloudlet.api.server import Server
from cloudlet.api.service import applications, peers_server_of, server_of, tell_url
from cloudlet.api.tls import context_of
from cloudlet.cli import logs
from cloudlet.cli.command import CloudletCommand
from cloudlet.cli.exclusive import only_server
from cloudlet.errors import CloudletError, ExitCode
from cloudlet.service.options import Options, read_options
from cloudlet.service.site import ServedSite
from cloudlet.settings import read_files

LOG = log.getLogger(__name__)


class Serve(CloudletCommand):
    """Serve this machine as a cloudlet: publishers put apps on it, users get their VM over HTTP.

    Without an address it listens on a Unix socket that only you can open, and whoever opens it is the
    operator. On a port, users show a name and a password; the first one is made and told at the first start.
    Ctrl-C ends serving, not the instances: the next start finds them.

    Example: cloudlet serve --listen 127.0.0.1:8790
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--listen",
            metavar="ADDRESS",
            help="unix:PATH, or HOST:PORT (default: as configured, else api.sock)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        options = self._options(parsed_args.listen)
        logs.begin(self.app.options.config_file, quiet=self.app.quiet)
        _raise_limit()
        with only_server(options.machine.state_dir, shared=bool(options.job_board)):
            if options.auth_strategy == "http_basic" and (first := identity.first_user(options.users_file)):
                # On standard output, and nowhere else, not even in the log.
                print(f"user {first[0]}, password {first[1]} (told only now)", flush=True)
            site = ServedSite.open(options)
            try:
                apps = applications(site)
                servers = [server_of(options, apps.everybody)]
                if for_peers := peers_server_of(site, apps.peers):
                    servers.append(for_peers)
                    self.app.say(f"peers reach it at {site.peers.url}")
                tell_url(site, servers[0])
                self._hear(servers, site, parsed_args.listen)
                self.app.say(f"serving at {servers[0].where}; Ctrl-C ends it, instances go on")
                _serve(servers)
            finally:
                site.close()
                sys.stdout.flush()
            # What is being worked on stays as it is, for the next server; nobody waits here until it is done.
            os._exit(ExitCode.DONE)

    def _options(self, listen: str | None) -> Options:
        return read_options(read_files(self.app.options.config_file), self.app.settings, listen)

    def _hear(self, servers: Sequence[Server], site: ServedSite, listen: str | None) -> None:
        def stop() -> None:
            site.news.close()
            for server in servers:
                server.stop()

        def end(*_: object) -> None:
            # Not here: the thread that serves may hold a lock that stopping needs.
            threading.Thread(target=stop, name="stop").start()

        def reload(*_: object) -> None:
            threading.Thread(target=self._reload, args=(servers[0], site, listen), name="reload").start()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        signal.signal(signal.SIGHUP, reload)

    def _reload(self, server: Server, site: ServedSite, listen: str | None) -> None:
        try:
            options = self._options(listen)
            if options.tls:
                server.renew(context_of(*options.tls))
            site.reload(options)
            LOG.info("limits, leases and the certificate were read again")
        except CloudletError as error:
            LOG.error("the settings stay as they were: %s", error)


def _serve(servers: Sequence[Server]) -> None:
    """Serve until all are stopped."""
    first, *others = servers
    threads = [threading.Thread(target=server.serve, name="peers") for server in others]
    for thread in threads:
        thread.start()
    first.serve()
    for thread in threads:
        thread.join()


def _raise_limit() -> None:
    """Allow as many descriptors as may be: each client costs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # the system's own limit is lower by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
