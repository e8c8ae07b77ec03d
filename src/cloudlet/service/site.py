"""A site that serves: everything its stories need, wired once, opened and closed in the right order."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from oslo_log import log

from cloudlet.control.site import Site
from cloudlet.errors import NotFoundError, UsageError
from cloudlet.service.alone import Alone
from cloudlet.service.apps import Apps
from cloudlet.service.arrivals import Arrivals
from cloudlet.service.bases import Bases
from cloudlet.service.departures import Departures
from cloudlet.service.draining import Draining
from cloudlet.service.engine import create_tables
from cloudlet.service.flows import FLOWS
from cloudlet.service.housekeeping import Housekeeping
from cloudlet.service.instances import Instances
from cloudlet.service.keeping import Keeping
from cloudlet.service.leases import Leases
from cloudlet.service.meters import Meters
from cloudlet.service.news import News
from cloudlet.service.options import Options
from cloudlet.service.overlays import Overlays
from cloudlet.service.peers import Peers
from cloudlet.service.shutdown import Shutdown
from cloudlet.service.steps import Observer
from cloudlet.service.tidying import Tidying
from cloudlet.service.webhooks import Webhooks
from cloudlet.service.work import Work
from cloudlet.store.blobs import BlobStore
from cloudlet.store.database import Database

if TYPE_CHECKING:
    from cloudlet.service.board import Board
    from cloudlet.service.conductor import Conductor

LOG = log.getLogger(__name__)


_OTHERS_SECONDS, _ALONE_SECONDS = 0.1, 1.0
"""How often to look for what others wrote, where processes share the work and where there should be none."""


class ServedSite:
    """A cloudlet that is a service. Open one with :meth:`open`, and close it.

    It is one process that does everything; or, where a job board is configured, any number of processes that
    answer users and leave all that takes long to conductors.
    """

    def __init__(
        self, options: Options, machine: Site, database: Database, observe: Observer, *, conducts: bool
    ) -> None:
        self.options = options
        self.machine = machine
        self.database = database
        self.id = database.fact("site_id")
        self.name = socket.gethostname()
        self.api_url = options.public_url
        """Where users reach the API, told to those whose instance has come here. Empty: nobody knows."""
        self.alone = Alone(options.machine.state_dir / "alone.lock")
        self.meters = Meters()
        self.blobs = BlobStore(database, options.blobs_dir, options.limits.blob_cache_bytes)
        self.news = News(database, _OTHERS_SECONDS if options.job_board else _ALONE_SECONDS)
        self.board = _board(options, self.id)
        self.work = Work(self, FLOWS, self.board, observe)
        self.keeping = Keeping(self)
        self.bases = Bases(self)
        self.overlays = Overlays(self)
        self.apps = Apps(self)
        self.instances = Instances(self)
        self.peers = Peers(self)
        self.departures = Departures(self)
        self.arrivals = Arrivals(self)
        self.draining = Draining(self)
        self.leases = Leases(self)
        self.shutdown = Shutdown(self)
        self.tidying = Tidying(self)
        self.webhooks = Webhooks(self)
        self.housekeeping = Housekeeping(self)
        self.conductor = _conductor(self, self.board) if self.board and conducts else None

    @classmethod
    def open(cls, options: Options, observe: Observer = lambda *_: None, *, conducts: bool = False) -> Self:
        """The site of these settings, as the last process left it: what it was doing goes on.

        :param conducts: whether to do work, where that is taken from a job board.
        :raises FailedError: the database or the job board cannot be reached, or is a newer program's.
        """
        database = Database(options.database_url)
        machine = Site.open(options.machine)
        with Alone(options.machine.state_dir / "alone.lock").with_("opening"):
            database.create()
            create_tables(database)
            _have_a_key(machine)
        site = cls(options, machine, database, observe, conducts=conducts)
        if not site.board:
            site.housekeeping.begin()
        elif site.conductor:
            site.keeping.keepers.warm()
            site.conductor.begin()
            site.housekeeping.wait()
        return site

    def reload(self, options: Options) -> None:
        """Take over what may change while it runs: limits, leases, how long things are kept, hand-offs."""
        peers = replace(
            self.options.peers,
            patience_seconds=options.peers.patience_seconds,
            grace_seconds=options.peers.grace_seconds,
            bytes_per_second=options.peers.bytes_per_second,
        )
        self.options = replace(
            self.options,
            limits=options.limits,
            leases=options.leases,
            keep_days=options.keep_days,
            peers=peers,
        )
        self.blobs.limit = options.limits.blob_cache_bytes
        self.leases.look()

    def close(self) -> None:
        """Stop serving. Machines go on, and operations wait for the next process."""
        self.housekeeping.close()
        self.news.close()
        if self.conductor:
            self.conductor.close()
        self.work.close()
        self.keeping.close()
        self.database.close()


def _board(options: Options, site_id: str) -> Board | None:
    """The site's job board, if it has one.

    :raises UsageError: what it needs is not installed.
    :raises FailedError: it cannot be reached.
    """
    if not options.job_board:
        return None
    try:
        from cloudlet.service.board import Board
    except ImportError as error:
        raise UsageError(f"job_board: {error}", hint="pip install 'cloudlet[conductor]'") from error
    board = Board(options.job_board, site_id)
    board.connect()
    return board


def _conductor(site: ServedSite, board: Board) -> Conductor:
    from cloudlet.service.conductor import Conductor  # it is there where the board is

    return Conductor(board, site.work.perform, site.work.hear_cancelled, site.options.workers)


def _have_a_key(machine: Site) -> None:
    """A site signs what it saves."""
    try:
        machine.keys.signer()
    except NotFoundError:
        machine.keys.generate()
        LOG.info("made the site's own signing key in %s", machine.settings.keys_dir)
