"""The log of a program that goes on: lines with time and request id.

On standard error, or where the options of oslo.log in the settings say: a file, the journal, as JSON.
"""

from __future__ import annotations

from oslo_config import cfg
from oslo_log import log

from cloudlet.errors import UsageError
from cloudlet.settings import usual_files

_SILENT = ("taskflow", "sqlalchemy", "alembic", "oslo_db", "cheroot", "keystonemiddleware")


def begin(config_file: str | None = None, *, quiet: bool = False) -> None:
    """Begin to log; only warnings and errors if it is to be quiet.

    :param config_file: the settings; without, the usual files.
    :raises UsageError: the log cannot be as they say.
    """
    conf = cfg.ConfigOpts()
    log.register_options(conf)
    try:
        files = [config_file] if config_file else usual_files()
        conf(args=[], project="cloudlet", default_config_files=files, default_config_dirs=[])
        elsewhere = conf.log_file or conf.log_dir or conf.use_syslog or conf.use_journal
        conf.set_default("use_stderr", not elsewhere)
        levels = [f"{name}=WARNING" for name in _SILENT]
        conf.set_default("default_log_levels", [*levels, "cloudlet=WARNING" if quiet else "cloudlet=INFO"])
        log.setup(conf, "cloudlet")
    except (cfg.Error, ValueError, OSError, log.LogConfigError) as error:
        raise UsageError(f"settings of the log: {error}") from error
