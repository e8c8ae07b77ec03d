"""The program ``cloudlet-status``: whether this machine is ready for this version of the service.

``cloudlet-status upgrade check`` is OpenStack's way (oslo.upgradecheck): exit code 0 for ready, 1 for
something to look at, 2 for something that stops the service, 255 for a defect. Looking changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points

from oslo_config import cfg
from oslo_upgradecheck.upgradecheck import Code, Result, UpgradeCommands
from oslo_upgradecheck.upgradecheck import main as check_all

from cloudlet.api.identity import read_users
from cloudlet.api.policy import Policy
from cloudlet.api.service import tokens_of
from cloudlet.api.table import TABLE
from cloudlet.api.tls import context_of, ends_at
from cloudlet.cli.manage.database import SYNC, version_of
from cloudlet.control.site import DRIVERS
from cloudlet.errors import CloudletError, NotFoundError, RefusedError, of_the_system
from cloudlet.hypervisor.qemu.launch import find_qemu
from cloudlet.service.options import Options, read_options
from cloudlet.settings import settings_of, unread, usual_files
from cloudlet.store.database import latest_version

_CANNOT_LOOK = 255
_SOON = timedelta(days=14)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status, as the module says."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    conf = unread()
    try:
        return int(check_all(conf, "cloudlet", Checks(conf), argv or ["--help"], usual_files()))
    except cfg.Error as error:
        print(f"cloudlet-status: {error}", file=sys.stderr)
        return _CANNOT_LOOK


def _settings(options: Options) -> Result:
    if options.publish_address in ("0.0.0.0", "::"):
        said = (
            f"users are told {options.publish_address} as the address of instances: set [api] publish_address"
        )
        return Result(Code.WARNING, said)
    return Result(Code.SUCCESS, f"state in {options.machine.state_dir}")


def _identity(options: Options) -> Result:
    tokens_of(options)
    if options.auth_strategy == "http_basic" and not read_users(options.users_file):
        return Result(Code.WARNING, f"no users in {options.users_file}: cloudlet-manage user set NAME")
    return Result(Code.SUCCESS, options.auth_strategy)


def _certificate(options: Options) -> Result:
    if not options.tls:
        if options.listening.path or options.listening.host.startswith(("127.", "::1", "localhost")):
            return Result(Code.SUCCESS, "none: only this machine is served")
        return Result(Code.WARNING, "none: passwords and tokens can be read on their way")
    context_of(*options.tls)
    ends = ends_at(options.tls[0])
    soon = ends - datetime.now(UTC) < _SOON
    said = f"{'ends' if ends > datetime.now(UTC) else 'ended'} at {ends:%Y-%m-%d %H:%M} UTC"
    return Result(Code.WARNING if soon else Code.SUCCESS, said)


def _database(options: Options) -> Result:
    version, newest = version_of(options.database_url), latest_version()
    if version == newest:
        return Result(Code.SUCCESS, f"version {version}")
    if version is None or version < newest:
        older = f"version {version or 'none'}, not {newest}"
        return Result(Code.WARNING, f"{older}; the service changes it when it starts, or: {SYNC}")
    return Result(Code.FAILURE, f"version {version} is of a newer Cloudlet than this one")


def _folders(options: Options) -> Result:
    machine = options.machine
    for folder in (machine.cache_dir, machine.state_dir, machine.keys_dir):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise RefusedError(f"cannot write to {there}", hint="give this user the right")
    return Result(Code.SUCCESS)


def _hypervisor(options: Options) -> Result:
    name = options.machine.hypervisor
    if name == "qemu":
        path, version = find_qemu(options.machine.qemu_binary)
        return Result(Code.SUCCESS, f"{path} {'.'.join(map(str, version))}")
    if name != "fake" and not entry_points(group=DRIVERS, name=name):
        raise NotFoundError(f"there is no hypervisor driver {name!r}", hint="install the package that has it")
    return Result(Code.SUCCESS, name)


def _policy(options: Options) -> Result:
    if unknown := Policy(TABLE, options.policy_file).unknown():
        return Result(Code.WARNING, f"rules for operations that there are not: {', '.join(unknown)}")
    return Result(Code.SUCCESS)


def _found(checks: Checks, look: Callable[[Options], Result]) -> Result:
    """What a look finds; an error is what is wrong."""
    try:
        return look(read_options(checks.conf, settings_of(checks.conf)))
    except CloudletError as error:
        return Result(Code.FAILURE, str(error))
    except OSError as error:
        return Result(Code.FAILURE, str(of_the_system(error)))


class Checks(UpgradeCommands):
    """What is looked at, in this order."""

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self.conf = conf

    _upgrade_checks = tuple(
        (name, (_found, {"look": look}))
        for name, look in {
            "Settings": _settings,
            "Who may call": _identity,
            "Certificate": _certificate,
            "Database": _database,
            "Folders": _folders,
            "Hypervisor": _hypervisor,
            "Policy": _policy,
        }.items()
    )


if __name__ == "__main__":
    sys.exit(main())
