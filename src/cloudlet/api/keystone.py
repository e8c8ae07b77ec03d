"""Tokens of Keystone: keystonemiddleware around the application.

Imported only where ``auth_strategy`` is ``keystone``. The middleware finds out whose a token is and writes
it into the environment; who is let in, and what a refusal looks like, is decided behind it
(:class:`cloudlet.api.identity.Keystone`). So public operations need no token, and errors have our bodies.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any
from wsgiref.types import WSGIApplication

from keystoneauth1.exceptions import ClientException, NotFound
from keystoneauth1.loading import load_auth_from_conf_options
from keystonemiddleware import auth_token
from keystonemiddleware.exceptions import ConfigurationError
from oslo_config import cfg
from webob.exc import HTTPServiceUnavailable

from cloudlet.api.identity import UNAVAILABLE
from cloudlet.api.microversion import SERVICE_TYPE
from cloudlet.errors import UsageError

GROUP = "keystone_authtoken"
_DEFAULTS = {"http_connect_timeout": 10, "http_request_max_retries": 1}
"""Ours; the middleware's would wait for Keystone without end."""
_TOKEN = re.compile(r"[!-~]{1,8192}")
"""What can be a token at all: anything else Keystone would answer as if it were broken."""


class Tokens:
    """What ``[keystone_authtoken]`` says, checked without asking Keystone.

    :param conf: settings that were read; the middleware adds its options to them.
    :raises UsageError: something is missing there or cannot be used.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._conf = conf
        try:
            for group, options in auth_token.list_opts():
                conf.register_opts(options, group=group)
            for name, value in _DEFAULTS.items():
                conf.set_default(name, value, group=GROUP)
            plugin = load_auth_from_conf_options(conf, GROUP)
            self.uri = str(conf[GROUP].www_authenticate_uri or getattr(plugin, "auth_url", ""))
            seconds = conf[GROUP].token_cache_time
        except (ClientException, cfg.Error, ValueError) as error:
            raise _unusable(error) from error
        if plugin is None:
            raise _unusable("auth_type is not set")
        # Its cache on a machine's own memory would keep a token for ever, even one that is revoked.
        self._cache_seconds = seconds or -1

    def around(self, app: WSGIApplication, public: Collection[str] = ()) -> WSGIApplication:
        """An application of which each request has been looked at by the middleware.

        :param public: paths whose answers do not wait for Keystone, whatever token comes along.
        :raises UsageError: the middleware cannot be used as it is configured.
        """
        settings = {
            "oslo_config_config": self._conf,
            "delay_auth_decision": True,
            "service_type": SERVICE_TYPE,
            "token_cache_time": self._cache_seconds,
            "www_authenticate_uri": self.uri,
        }
        try:
            checked: WSGIApplication = _Middleware(app, settings, public)
        except (ClientException, ConfigurationError, cfg.Error) as error:
            raise _unusable(error) from error
        return checked


class _UnavailableError(Exception):
    """Keystone did not say whether a token is valid."""


class _Middleware(auth_token.AuthProtocol):  # type: ignore[misc]  # it has no types
    """The middleware, which tells a Keystone that does not answer from a token that is not valid."""

    def __init__(self, app: WSGIApplication, settings: dict[str, Any], public: Collection[str]) -> None:
        super().__init__(app, settings)
        self._public = frozenset(public)

    def fetch_token(self, token: str, **options: Any) -> Any:
        if not _TOKEN.fullmatch(token):
            raise auth_token.InvalidToken("this is no token")
        try:
            return super().fetch_token(token, **options)
        except auth_token.InvalidToken as error:
            # It is raised for both; what Keystone said of the token is nothing, or that it is not there.
            if error.__context__ is None or isinstance(error.__context__, NotFound):
                raise
            raise _UnavailableError from error
        except (ClientException, HTTPServiceUnavailable) as error:
            raise _UnavailableError from error

    def process_request(self, request: Any) -> Any:
        if request.path_info in self._public:
            request.remove_auth_headers()
            return None
        try:
            return super().process_request(request)
        except _UnavailableError:
            request.environ[UNAVAILABLE] = "Keystone does not answer"
            return None

    def process_response(self, response: Any) -> Any:
        return response


def _unusable(why: object) -> UsageError:
    return UsageError(f"[{GROUP}]: {why}", hint="see 'With Keystone' in the documentation")
