"""The step-by-step renewal, run by real shells in a name space with folders of its own in place of /etc.

They lack the right to set the clock, which is this machine's, and find no ``pkill``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from cloudlet.control import identity
from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import GuestAgent
from cloudlet.store.bases import Guest

ASKS = Guest(agent=True, clone_agent=False, quiet=False)
BEFORE = "0" * 32
APART = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
APART += ["setpriv", "--bounding-set=-sys_time"]
CAP_SYS_TIME = 25


class Host:
    """A guest agent that runs programs on this machine, kept from its clock, its name and its /etc."""

    def __init__(self, folder: Path, shell: Sequence[str]) -> None:
        self.etc, self.programs, self.shell = folder / "etc", folder / "programs", shell
        self.programs.mkdir()
        (self.etc / "ssh").mkdir(parents=True)
        (self.etc / "ssh" / "ssh_host_rsa_key").write_text("old")
        (self.etc / "machine-id").write_text(BEFORE + "\n")
        (self.etc / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
        for name in ("date", "hostname", "tr", "rm", "ssh-keygen"):
            (self.programs / name).symlink_to(shutil.which(name) or name)
        # Some shells have a pkill built in: they see no process but their own.

    def program(self, name: str, script: str) -> None:
        (self.programs / name).unlink(missing_ok=True)
        (self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.programs / name).chmod(0o755)

    def ping(self, timeout: float) -> bool:
        return True

    def run(self, argv, *, timeout, stdin=b"", output=None) -> tuple[int, bytes]:
        assert argv[0] == "/bin/sh"
        setting = 'mount --bind "$1" /etc; PATH=$2; shift 2; exec "$@"'
        done = subprocess.run(
            [*APART, "/bin/sh", "-ec", setting, "sh", self.etc, self.programs, *self.shell, *argv[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(params=[("/bin/sh",), ("/bin/busybox", "sh")], ids=["sh", "busybox"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    shell = list(request.param)
    shell[0] = shutil.which(shell[0]) or shutil.which(Path(shell[0]).name) or ""
    rights = subprocess.run([*APART, "cat", "/proc/self/status"], capture_output=True, text=True, check=False)
    assert shell[0], f"{request.param[0]} is missing: tools/setup test"
    if os.geteuid() or rights.returncode:
        pytest.skip("needs root and name spaces")
    (effective,) = [line.split()[1] for line in rights.stdout.splitlines() if line.startswith("CapEff:")]
    assert not int(effective, 16) >> CAP_SYS_TIME & 1
    return Host(tmp_path, shell)


def renew(host: GuestAgent) -> None:
    assert identity.renew(host, ASKS, "clone-1") is not None


def test_all_is_renewed(host: Host) -> None:
    renew(host)
    assert (host.etc / "hostname").read_text() == "clone-1\n"
    machine_id = (host.etc / "machine-id").read_text().strip()
    assert len(machine_id) == 32
    assert machine_id != BEFORE
    assert sorted(path.name for path in (host.etc / "ssh").iterdir()) == [
        "ssh_host_ed25519_key",
        "ssh_host_ed25519_key.pub",
    ]


def test_what_a_guest_lacks_is_no_failure(host: Host) -> None:
    (host.etc / "machine-id").unlink()
    (host.programs / "ssh-keygen").unlink()
    renew(host)
    assert not (host.etc / "machine-id").exists()
    assert (host.etc / "ssh" / "ssh_host_rsa_key").read_text() == "old"


def test_each_failure_is_one(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("machine-id", "hostname"):
        (host.etc / file).unlink(missing_ok=True)
        (host.etc / file).mkdir()
        with pytest.raises(FailedError, match=f"/etc/{file} could not be"):
            renew(host)
        (host.etc / file).rmdir()
    host.program("ssh-keygen", "exit 1")
    with pytest.raises(FailedError, match="SSH host key could not be"):
        renew(host)
    (host.programs / "ssh-keygen").unlink()
    renew(host)
    tomorrow = identity.time.time() + 86400
    monkeypatch.setattr(identity.time, "time", lambda: tomorrow)
    with pytest.raises(FailedError, match="the clock could not be"):
        renew(host)
