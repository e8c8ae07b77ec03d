"""The log of a program that goes on: lines with time and request id on standard error."""

from __future__ import annotations

from oslo_config import cfg
from oslo_log import log

_SILENT = ("taskflow", "sqlalchemy", "alembic", "oslo_db", "cheroot", "keystonemiddleware")


def begin(*, quiet: bool = False) -> None:
    """Begin to log; only warnings and errors if it is to be quiet."""
    conf = cfg.ConfigOpts()
    log.register_options(conf)
    conf(args=[], project="cloudlet", default_config_files=[], default_config_dirs=[])
    conf.set_override("use_stderr", True)
    levels = [f"{name}=WARNING" for name in _SILENT]
    conf.set_override("default_log_levels", [*levels, "cloudlet=WARNING" if quiet else "cloudlet=INFO"])
    log.setup(conf, "cloudlet")
