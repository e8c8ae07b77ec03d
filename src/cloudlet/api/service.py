"""The API of a site, put together: table, policy, identity, figures, as a WSGI application."""

from __future__ import annotations

from wsgiref.types import WSGIApplication

from cloudlet.api import openapi
from cloudlet.api.dispatch import Dispatcher
from cloudlet.api.figures import Figures
from cloudlet.api.identity import HttpBasic, Keystone, NoAuth, Strategy
from cloudlet.api.operation import Desk, Slots
from cloudlet.api.policy import Policy
from cloudlet.api.table import TABLE
from cloudlet.api.wsgi import application
from cloudlet.service.options import Options
from cloudlet.service.site import ServedSite


def build(site: ServedSite) -> WSGIApplication:
    """The application that serves a site."""
    options = site.options
    desk = Desk(options.threads)
    waiters = Slots(options.waiters, "clients wait", desk)
    transfers = Slots(options.transfers, "uploads and downloads", desk)
    figures = Figures(site, waiters, transfers)
    dispatcher = Dispatcher(
        site,
        Policy(TABLE, options.policy_file),
        _strategy(options),
        desk=desk,
        waiters=waiters,
        transfers=transfers,
        measured=figures.measured,
        document=lambda: openapi.text(TABLE),
        figures=figures.text,
    )
    return application(dispatcher, TABLE)


def _strategy(options: Options) -> Strategy:
    match options.auth_strategy:
        case "noauth":
            return NoAuth()
        case "http_basic":
            return HttpBasic(options.users_file)
        case _:
            return Keystone()
