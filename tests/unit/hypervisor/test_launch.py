"""Finding QEMU, and the barrier around what is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudlet.errors import ExitCode, FailedError, NotFoundError
from cloudlet.hypervisor.qemu import launch
from cloudlet.hypervisor.records import Workspace


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH; what was found before does not count."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launch.find_qemu.cache_clear()
    return tmp_path


def program(path: Path, script: str) -> str:
    file = path / "qemu-system-x86_64"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file.name


@pytest.fixture(autouse=True)
def forget() -> None:
    yield
    launch.find_qemu.cache_clear()


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.9 (Debian 1:7.2+dfsg-7)", (7, 2)),
        ("QEMU emulator version 10.0.0", (10, 0)),
    ],
)
def test_qemu_is_found(path: Path, said: str, version: tuple[int, int]) -> None:
    name = program(path, f"echo '{said}'")
    assert launch.find_qemu(name) == (str(path / name), version)


@pytest.mark.parametrize(
    "said", ["QEMU emulator version 6.2.0", "QEMU emulator version 7.1.0", "something else"]
)
def test_one_that_is_too_old(path: Path, said: str) -> None:
    with pytest.raises(NotFoundError, match="too old") as caught:
        launch.find_qemu(program(path, f"echo '{said}'"))
    assert caught.value.exit_code is ExitCode.NOT_FOUND
    assert "7.2" in caught.value.hint


def test_one_that_is_not_there(path: Path) -> None:
    with pytest.raises(NotFoundError, match="not installed"):
        launch.find_qemu("qemu-system-there-is-none")


def test_one_that_does_not_run(path: Path) -> None:
    with pytest.raises(FailedError, match="does not run"):
        launch.find_qemu(program(path, "exit 1"))


_LOOK = """
echo "groups $(id -G)"
grep -E '^(Uid|NoNewPrivs|CapEff|CapBnd|CapInh)' /proc/self/status
echo "cores $(ulimit -c)"
echo "networks $(cut -d: -f1 /proc/net/dev | tail -n +3 | tr -d ' ' | sort | tr '\\n' ' ')"
echo "environment $(env | cut -d= -f1 | grep -v -e PWD -e SHLVL -e ^_ | sort | tr '\\n' ' ')"
echo "read $(cat <&9)"
"""


def test_what_is_started_is_confined(tmp_path: Path) -> None:
    uid = 400001 if launch.runs_as_root() else None
    secret = tmp_path / "file"
    secret.write_text("by its descriptor")
    secret.chmod(0o600)
    with Workspace.create(tmp_path / "state") as workspace:
        descriptor = os.open(secret, os.O_RDONLY)
        try:
            script = _LOOK.replace("<&9", f"<&{descriptor}")
            process = launch.start(
                ["/bin/bash", "-c", script], workspace, [descriptor], launch.confinement(uid)
            )
        finally:
            os.close(descriptor)
        assert process.wait(20.0) == 0
        said = (workspace.path / "qemu.log").read_text()
        lines = {line.split()[0].rstrip(":"): line.split()[1:] for line in said.splitlines()}
        assert launch.last_words(workspace.path) == "read by its descriptor"
    assert lines["NoNewPrivs"] == ["1"]
    assert lines["cores"] == ["0"]
    assert lines["environment"] == ["CLOUDLET_INSTANCE", "LC_ALL", "PATH"]
    if uid is not None:
        assert lines["Uid"] == [str(uid)] * 4
        assert lines["groups"] == [str(uid)]
        for capabilities in ("CapEff", "CapBnd", "CapInh"):
            assert int(lines[capabilities][0], 16) == 0
        assert lines["networks"] == ["lo"]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (None, ""),
        ("", ""),
        ("qemu-system-x86_64: -accel kvm: failed\n", "-accel kvm: failed"),
        ("real reason\nqemu-system-x86_64: warning: something\n{vmdescription}\n", "real reason"),
        ("qemu-system-x86_64: warning: only that\n", ""),
    ],
)
def test_last_words(tmp_path: Path, log: str | None, words: str) -> None:
    if log is not None:
        (tmp_path / "qemu.log").write_text(log)
    assert launch.last_words(tmp_path) == words
