"""The API of a site, put together: table, policy, identity, figures, as applications and their servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from wsgiref.types import WSGIApplication

from cloudlet.api import openapi
from cloudlet.api.dispatch import Dispatcher
from cloudlet.api.figures import Figures
from cloudlet.api.identity import HttpBasic, Keystone, NoAuth, Strategy
from cloudlet.api.operation import Desk, Slots, Turns
from cloudlet.api.policy import Policy
from cloudlet.api.server import Server
from cloudlet.api.table import PEERS_TABLE, TABLE
from cloudlet.api.tls import context_of, own_context
from cloudlet.api.wsgi import application
from cloudlet.errors import UsageError
from cloudlet.service.options import EVERY_ADDRESS, Options
from cloudlet.service.site import ServedSite

if TYPE_CHECKING:
    from cloudlet.api.keystone import Tokens


_TURNS = 4
"""Of what a peer asks of a hand-off: it sends two batches of records at a time, and may come back to each."""


@dataclass(frozen=True, slots=True)
class Applications:
    """What a site serves. Who is served by one of them has a place among those of both."""

    everybody: WSGIApplication
    """All operations."""
    peers: WSGIApplication
    """Those of other cloudlets alone, whatever else lets callers in: where only they should come."""


def build(site: ServedSite) -> WSGIApplication:
    """The application that serves a site.

    :raises UsageError: the settings ask for what cannot be.
    """
    return applications(site).everybody


def applications(site: ServedSite) -> Applications:
    """The applications that serve a site.

    :raises UsageError: the settings ask for what cannot be.
    """
    options = site.options
    tokens = tokens_of(options)
    desk = Desk(options.threads)
    waiters = Slots(options.waiters, "clients wait", desk)
    transfers = Slots(options.transfers, "uploads and downloads", desk)
    figures = Figures(site, waiters, transfers)
    dispatcher = Dispatcher(
        site,
        Policy(TABLE, options.policy_file),
        Keystone(tokens.uri) if tokens else _strategy(options),
        desk=desk,
        waiters=waiters,
        transfers=transfers,
        turns=Turns(_TURNS, "requests about this hand-off are answered"),
        measured=figures.measured,
        document=lambda: openapi.text(TABLE),
        figures=figures.text,
    )
    app, for_peers = application(dispatcher, TABLE), application(dispatcher, PEERS_TABLE)
    if tokens:
        closed = {operation.path for operation in TABLE if not (operation.public or operation.for_peers)}
        app = tokens.around(app, {operation.path for operation in TABLE} - closed)
    return Applications(app, for_peers)


def server_of(options: Options, app: WSGIApplication) -> Server:
    """The server of everybody, where the settings say.

    :raises UsageError: its certificate cannot be used.
    :raises ConflictError: that is not possible there.
    """
    busy = options.waiters + options.transfers
    tls = context_of(*options.tls) if options.tls else None
    return Server(options.listening, app, threads=options.threads, busy=busy, tls=tls)


def peers_server_of(site: ServedSite, app: WSGIApplication) -> Server | None:
    """The server of other cloudlets, where the settings say; None: nowhere.

    Peers are told where it listens, if they are told nothing else.

    :raises ConflictError: that is not possible there.
    """
    options = site.options
    if not options.peers.listening:
        return None
    signer = site.machine.keys.signer()
    server = Server(
        options.peers.listening,
        app,
        threads=options.threads,
        busy=options.waiters + options.transfers,
        tls=own_context(signer, site.id, options.machine.state_dir / "peers.pem"),
        # Where the kernel chooses the port, each process has its own.
        shared=bool(options.job_board and options.peers.listening.port),
    )
    site.peers.url = site.peers.url or server.where
    return server


def tell_url(site: ServedSite, server: Server) -> None:
    """Have a site know where users reach its API by where that listens, if the settings do not say it.

    Of a server that listens on every address the host is the one by which peers reach the site. Nobody else
    than who is on this machine reaches a Unix socket: then it is not known.
    """
    where = urlsplit(server.where)
    if site.api_url or not where.port:
        return
    host = where.hostname or ""
    if host in EVERY_ADDRESS:
        host = urlsplit(site.peers.url).hostname or ""
    if host:
        site.api_url = f"{where.scheme}://{f'[{host}]' if ':' in host else host}:{where.port}"


def tokens_of(options: Options) -> Tokens | None:
    """How Keystone's tokens are verified; None where callers show who they are in another way.

    :raises UsageError: the settings do not say it, or keystonemiddleware is not installed.
    """
    if options.auth_strategy != "keystone":
        return None
    try:
        from cloudlet.api.keystone import Tokens
    except ImportError as error:
        raise UsageError(f"auth_strategy: {error}", hint="pip install 'cloudlet[keystone]'") from error
    return Tokens(options.keystone)


def _strategy(options: Options) -> Strategy:
    return NoAuth() if options.auth_strategy == "noauth" else HttpBasic(options.users_file)
