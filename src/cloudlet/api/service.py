"""The API of a site, put together: table, policy, identity, figures, as a WSGI application."""

from __future__ import annotations

from typing import TYPE_CHECKING
from wsgiref.types import WSGIApplication

from cloudlet.api import openapi
from cloudlet.api.dispatch import Dispatcher
from cloudlet.api.figures import Figures
from cloudlet.api.identity import HttpBasic, Keystone, NoAuth, Strategy
from cloudlet.api.operation import Desk, Slots
from cloudlet.api.policy import Policy
from cloudlet.api.table import TABLE
from cloudlet.api.wsgi import application
from cloudlet.errors import UsageError
from cloudlet.service.options import Options
from cloudlet.service.site import ServedSite

if TYPE_CHECKING:
    from cloudlet.api.keystone import Tokens


def build(site: ServedSite) -> WSGIApplication:
    """The application that serves a site.

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
        measured=figures.measured,
        document=lambda: openapi.text(TABLE),
        figures=figures.text,
    )
    app = application(dispatcher, TABLE)
    if not tokens:
        return app
    closed = {operation.path for operation in TABLE if not operation.public}
    return tokens.around(app, {operation.path for operation in TABLE} - closed)


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
