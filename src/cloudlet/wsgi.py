"""``cloudlet.wsgi:application``: a site for servers of WSGI applications, such as gunicorn and uWSGI.

The settings are those of ``cloudlet serve``, from the usual files or from the one that
``CLOUDLET_CONFIG_FILE`` names; where to listen is the server's business. So callers show a password or a
token of Keystone: without authentication nothing is served here. More than one process needs a job board, and
``cloudlet-conductor``.

The site is opened when this module is loaded. Threads do not survive a fork: load it in each worker, not
before (gunicorn does; uWSGI with ``lazy-apps``).
"""

from __future__ import annotations

import atexit
import os
import threading
from contextlib import ExitStack
from wsgiref.types import WSGIApplication

from cloudlet.api.identity import read_users
from cloudlet.api.service import build
from cloudlet.cli import logs
from cloudlet.cli.exclusive import only_server
from cloudlet.errors import UsageError
from cloudlet.service.options import read_options
from cloudlet.service.site import ServedSite
from cloudlet.settings import read_files, settings_of

_WAIT_SECONDS = 20.0
"""A worker that is replaced may live on for a while; gunicorn takes who begins for dead after 30 seconds."""
_UNKNOWN = "127.0.0.1:0"
"""Where the server listens is not known here, but it is no place that only the operator can reach."""


def _open(process: ExitStack) -> WSGIApplication:
    settings = os.environ.get("CLOUDLET_CONFIG_FILE")
    logs.begin(settings)
    conf = read_files(settings)
    options = read_options(conf, settings_of(conf), _UNKNOWN)
    if options.auth_strategy == "http_basic" and not read_users(options.users_file):
        raise UsageError(f"{options.users_file} names no user", hint="cloudlet-manage user create NAME")
    folder, shared = options.machine.state_dir, bool(options.job_board)
    process.enter_context(only_server(folder, shared=shared, wait=_WAIT_SECONDS))
    site = ServedSite.open(options)
    process.callback(site.close)
    # Before what atexit knows of is called, the process joins the server's threads: streams must end first.
    threading._register_atexit(site.news.close)  # type: ignore[attr-defined]
    return build(site)


_process = ExitStack()
atexit.register(_process.close)
application = _open(_process)
