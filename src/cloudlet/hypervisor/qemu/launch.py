"""A confined QEMU process: a user of its own, no capabilities, no network, a system call filter.

The barrier is made of programs every Debian has (util-linux), each of which does one thing and then
becomes the next: no code of ours runs between fork and exec, so this is safe from a threaded server.
QEMU needs no right to any path: sockets, disks and memory are descriptors that it inherits.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cloudlet.errors import FailedError, NotFoundError
from cloudlet.hypervisor.records import Workspace
from cloudlet.sparse import tail_of

OLDEST = (7, 2)
_BIOS = "bios-256k.bin"


def confinement(uid: int | None, *, kvm: bool = False, dies_with_parent: bool = False) -> list[str]:
    """The beginning of a command line that confines what follows.

    :param uid: run as this user and group, without network; None keeps the caller's user (and network
        namespace, since making one takes a right that an ordinary user may not have).
    :param kvm: with the group that may open ``/dev/kvm``, and no other.
    :param dies_with_parent: the kernel ends it when the thread that started it ends.
    """
    no_cores = ["prlimit", "--core=0", "--"]
    with_parent = ["--pdeathsig=KILL"] if dies_with_parent else []
    if uid is None:
        return [*no_cores, "setpriv", "--no-new-privs", *with_parent, "--"]
    groups = f"--groups={Path('/dev/kvm').stat().st_gid}" if kvm else "--clear-groups"
    return [
        *no_cores, "unshare", "--net", "--ipc", "--",
        "setpriv", f"--reuid={uid}", f"--regid={uid}", groups, "--no-new-privs",
        "--inh-caps=-all", "--bounding-set=-all", *with_parent, "--",
    ]  # fmt: skip


def start(
    argv: Sequence[str], workspace: Workspace, descriptors: Sequence[int], confine: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start QEMU confined, in a session of its own; what it prints goes to ``qemu.log``.

    :param confine: from :func:`confinement`.
    :raises NotFoundError: a program that confines it is not installed.
    """
    for program in {"prlimit", "unshare", "setpriv"}.intersection(confine):
        if not shutil.which(program):
            raise NotFoundError(f"{program} is not installed", hint="apt-get install util-linux")
    with (workspace.path / "qemu.log").open("ab") as log:
        return subprocess.Popen(
            [*confine, *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=tuple(descriptors),
            env=workspace.environment(),
            cwd="/",
            start_new_session=True,
        )


def last_words(directory: Path) -> str:
    """The last line QEMU printed, for error messages."""
    try:
        lines = tail_of(directory / "qemu.log").splitlines()
    except FileNotFoundError:
        return ""
    telling = [
        line
        for line in lines
        if "vmdescription" not in line and not line.startswith("qemu-system-x86_64: warning")
    ]
    return telling[-1].removeprefix("qemu-system-x86_64: ") if telling else ""


@cache
def find_qemu(binary: str) -> tuple[str, tuple[int, int]]:
    """The path and version of QEMU.

    :raises NotFoundError: there is none, or it is too old.
    """
    path = shutil.which(binary)
    if not path:
        raise NotFoundError(f"{binary} is not installed", hint="apt-get install qemu-system-x86")
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise FailedError(f"{path} does not run: {error}", hint="reinstall qemu-system-x86") from error
    match = re.search(r"version (\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < OLDEST:
        found = match[0] if match else text.strip()[:40]
        raise NotFoundError(
            f"{path} is too old: {found}", hint="Cloudlet needs QEMU 7.2 or newer, as in Debian 12"
        )
    return path, version


@cache
def find_bios(binary: str) -> Path:
    """The firmware with which this QEMU starts a machine unless told otherwise.

    :raises NotFoundError: it is not installed.
    """
    answer = subprocess.run([binary, "-L", "help"], capture_output=True, text=True, timeout=20, check=False)
    for folder in answer.stdout.splitlines():
        if (path := Path(folder.strip(), _BIOS)).is_file():
            return path
    raise NotFoundError(f"the firmware {_BIOS} is not installed", hint="apt-get install seabios")


def runs_as_root() -> bool:
    """Whether machines get users of their own."""
    return os.geteuid() == 0
