"""A site that serves: everything its stories need, wired once, opened and closed in the right order."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Self

from oslo_log import log

from cloudlet.control.site import Site
from cloudlet.errors import NotFoundError
from cloudlet.service.apps import Apps
from cloudlet.service.bases import Bases
from cloudlet.service.flows import FLOWS
from cloudlet.service.instances import Instances
from cloudlet.service.keeping import Keeping
from cloudlet.service.leases import Leases
from cloudlet.service.news import News
from cloudlet.service.options import Options
from cloudlet.service.overlays import Overlays
from cloudlet.service.tidying import Tidying
from cloudlet.service.webhooks import Webhooks
from cloudlet.service.work import Observer, Work, create_tables
from cloudlet.store.blobs import BlobStore
from cloudlet.store.database import Database

LOG = log.getLogger(__name__)


class ServedSite:
    """A cloudlet that is a service. Open one with :meth:`open`, and close it."""

    def __init__(self, options: Options, machine: Site, database: Database, observe: Observer) -> None:
        self.options = options
        self.machine = machine
        self.database = database
        self.id = database.fact("site_id")
        self.name = socket.gethostname()
        self.blobs = BlobStore(database, options.blobs_dir, options.limits.blob_cache_bytes)
        self.news = News(database)
        self.work = Work(self, FLOWS, options.workers, observe)
        self.keeping = Keeping(self)
        self.bases = Bases(self)
        self.overlays = Overlays(self)
        self.apps = Apps(self)
        self.instances = Instances(self)
        self.leases = Leases(self)
        self.tidying = Tidying(self)
        self.webhooks = Webhooks(self)

    @classmethod
    def open(cls, options: Options, observe: Observer = lambda *_: None) -> Self:
        """The site of these settings, as the last process left it: what it was doing goes on.

        :raises FailedError: the database cannot be reached, or is a newer program's.
        """
        database = Database(options.database_url)
        database.create()
        create_tables(database)
        machine = Site.open(options.machine)
        _have_a_key(machine)
        site = cls(options, machine, database, observe)
        site.blobs.reap()
        site.bases.find_new()
        site.bases.find_left()
        site.overlays.find_left()
        site.keeping.adopt()
        if left := site.work.resume():
            LOG.info("going on with %d operations of the last process", len(left))
        site.leases.begin()
        site.tidying.begin()
        site.webhooks.begin()
        return site

    def reload(self, options: Options) -> None:
        """Take over what may change while it runs: limits, leases, and how long things are kept."""
        self.options = replace(
            self.options, limits=options.limits, leases=options.leases, keep_days=options.keep_days
        )
        self.blobs.limit = options.limits.blob_cache_bytes
        self.leases.look()

    def close(self) -> None:
        """Stop serving. Machines go on, and operations wait for the next process."""
        self.webhooks.close()
        self.tidying.close()
        self.leases.close()
        self.news.close()
        self.work.close()
        self.keeping.close()
        self.database.close()


def _have_a_key(machine: Site) -> None:
    """A site signs what it saves."""
    try:
        machine.keys.signer()
    except NotFoundError:
        machine.keys.generate()
        LOG.info("made the site's own signing key in %s", machine.settings.keys_dir)
