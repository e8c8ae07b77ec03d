"""The monitor, against a real QEMU without a machine, and against peers that are none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.monitor import Monitor
from cloudlet.hypervisor.qemu.sockets import listen

QEMU = "qemu-system-x86_64"
pytestmark = pytest.mark.qemu


@contextmanager
def running(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU without any machine: no guest, no memory."""
    with listen(path) as listening:
        descriptor = listening.fileno()
        process = subprocess.Popen(
            [
                QEMU, "-S", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none",
                "-chardev", f"socket,id=monitor0,fd={descriptor},server=on,wait=off",
                "-mon", "chardev=monitor0,mode=control",
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
        )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("monitor") / "monitor.sock"
    with running(path):
        yield path


def test_commands(qemu: Path) -> None:
    with closing(Monitor(qemu)) as monitor:
        assert monitor.execute("query-status")["status"] == "prelaunch"
        assert monitor.execute("query-version")["qemu"]["major"] >= 7
        assert monitor.human("info version").strip()
        # An underscore stands for a dash.
        assert monitor.execute("human-monitor-command", command_line="info status").startswith("VM status")
        monitor.close()


def test_a_command_that_is_refused(qemu: Path) -> None:
    with closing(Monitor(qemu)) as monitor:
        with pytest.raises(FailedError, match=r"QEMU refuses there-is-none: .*has not been found"):
            monitor.execute("there-is-none")
        assert monitor.execute("query-status")


def test_descriptors_are_handed_over(qemu: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with closing(Monitor(qemu)) as monitor:
            name, number = monitor.add_descriptor(descriptor)
            assert name == f"/dev/fdset/{number}"
            assert [entry["fdset-id"] for entry in monitor.execute("query-fdsets")] == [number]
            monitor.execute("remove-fd", fdset_id=number)
            with pytest.raises(FailedError, match="not found"):
                monitor.execute("remove-fd", fdset_id=number + 1)
            monitor.send_descriptor(descriptor, "named")
            monitor.execute("closefd", fdname="named")
            with pytest.raises(FailedError, match="not found"):
                monitor.execute("closefd", fdname="named")
    finally:
        os.close(descriptor)


def test_several_threads_may_ask(qemu: Path) -> None:
    answers: list[str] = []
    with closing(Monitor(qemu)) as monitor:

        def ask() -> None:
            answers.extend(monitor.execute("query-status")["status"] for _ in range(20))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20.0)
    assert answers == ["prelaunch"] * 80


def test_two_processes_take_turns(qemu: Path) -> None:
    """QEMU serves one connection at a time; one that is not used is given back, and made again."""
    with closing(Monitor(qemu)) as one:
        with closing(Monitor(qemu, timeout=10.0)) as other:
            assert other.execute("query-status")
        assert one.execute("query-status")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="QEMU is gone"):
        Monitor(tmp_path / "none.sock")


def test_one_who_does_not_greet(tmp_path: Path) -> None:
    with listen(tmp_path / "monitor.sock") as listening:
        began = time.monotonic()
        with pytest.raises(FailedError, match="did not answer connect"):
            Monitor(tmp_path / "monitor.sock", timeout=0.3)
        assert time.monotonic() - began < 5.0
        peer, _ = listening.accept()
        with peer:
            peer.settimeout(5.0)
            assert peer.recv(1) == b"", "the connection was left open"


def test_one_who_is_no_monitor(tmp_path: Path) -> None:
    with listen(tmp_path / "monitor.sock") as listening:

        def greet() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH\r\n")
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(FailedError, match="QEMU is gone"):
            Monitor(tmp_path / "monitor.sock")
        thread.join(5.0)
        assert not thread.is_alive()


def test_a_machine_that_ends(tmp_path: Path) -> None:
    with running(tmp_path / "monitor.sock") as process:
        monitor = Monitor(tmp_path / "monitor.sock")
        with closing(monitor):
            process.kill()
            process.wait()
            for _ in range(2):
                with pytest.raises(FailedError, match="QEMU is gone"):
                    monitor.execute("query-status")


def test_a_machine_that_is_stuck(tmp_path: Path) -> None:
    with running(tmp_path / "monitor.sock") as process:
        monitor = Monitor(tmp_path / "monitor.sock")
        with closing(monitor):
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(FailedError, match="did not answer query-status within 0 s"):
                monitor.execute("query-status", timeout=0.4)
            process.send_signal(signal.SIGCONT)
            assert monitor.execute("query-status")["status"] == "prelaunch"
