"""The agent's channel, against a peer that speaks as real agents do: late, in pieces, with leftovers."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.agent import QemuGuestAgent
from cloudlet.hypervisor.qemu.sockets import listen


class Peer:
    """An agent on a Unix socket; one connection at a time, and what it does is set before."""

    def __init__(self, path: Path) -> None:
        self.agent = QemuGuestAgent(path)
        self.requests: list[dict[str, Any]] = []
        self.delay = 0.0
        self.greeting = b""
        self.piece = 1 << 20
        self.silent = False
        self.hangs_up = False
        self.statuses: list[dict[str, Any]] = [{"exited": True, "exitcode": 0}]
        self.error = ""
        self._listening = listen(path)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                try:
                    self._talk(connection)
                except (BrokenPipeError, ConnectionResetError):
                    continue

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(self.greeting)
        if self.hangs_up:
            return
        for line in connection.makefile("rb"):
            request = json.loads(line.rpartition(b"\xff")[2])
            self.requests.append(request)
            if self.silent:
                continue
            self._send(connection, self._answer(request))

    def _answer(self, request: dict[str, Any]) -> bytes:
        match request["execute"]:
            case "guest-sync-delimited":
                return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"
            case "guest-exec" if self.error:
                return json.dumps({"error": {"class": "GenericError", "desc": self.error}}).encode() + b"\n"
            case "guest-exec":
                return b'{"return": {"pid": 7}}\n'
            case "guest-exec-status":
                status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
                return json.dumps({"return": status}).encode() + b"\n"
        return b'{"return": {}}\n'

    def _send(self, connection: socket.socket, answer: bytes) -> None:
        for at in range(0, len(answer), self.piece):
            if self.delay:
                time.sleep(self.delay)
            connection.sendall(answer[at : at + self.piece])


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path / "agent.sock")
    yield made
    made.close()


def ended(out: bytes = b"", err: bytes = b"", **more: int) -> dict[str, Any]:
    status: dict[str, Any] = {"exited": True, **(more or {"exitcode": 0})}
    if out:
        status["out-data"] = base64.b64encode(out).decode()
    if err:
        status["err-data"] = base64.b64encode(err).decode()
    return status


def test_it_answers(peer: Peer) -> None:
    assert peer.agent.ping(5.0)
    assert [request["execute"] for request in peer.requests] == ["guest-sync-delimited", "guest-ping"]


def test_a_program_runs_to_its_end(peer: Peer) -> None:
    peer.statuses = [{"exited": False}, {"exited": False}, ended(b"out", b"err", exitcode=3)]
    given: list[bytes] = []
    status, output = peer.agent.run(["/bin/x", "a", "b c"], timeout=5.0, stdin=b"in\0", output=given.append)
    assert (status, output) == (3, b"outerr")
    assert given == [b"outerr"]
    request = next(request for request in peer.requests if request["execute"] == "guest-exec")
    assert request["arguments"] == {
        "path": "/bin/x",
        "arg": ["a", "b c"],
        "capture-output": True,
        "input-data": base64.b64encode(b"in\0").decode(),
    }
    assert [request for request in peer.requests if request["execute"] == "guest-exec-status"] == [
        {"execute": "guest-exec-status", "arguments": {"pid": 7}}
    ] * 3


def test_a_program_that_a_signal_ended(peer: Peer) -> None:
    peer.statuses = [ended(signal=9)]
    assert peer.agent.run(["x"], timeout=5.0) == (137, b"")


def test_answers_in_pieces(peer: Peer) -> None:
    peer.piece, peer.delay = 3, 0.001
    peer.statuses = [ended(b"whole")]
    assert peer.agent.run(["x"], timeout=10.0) == (0, b"whole")


def test_a_long_output(peer: Peer) -> None:
    peer.statuses = [ended(b"x" * 3_000_000)]
    assert peer.agent.run(["x"], timeout=10.0) == (0, b"x" * 3_000_000)


@pytest.mark.parametrize(
    "greeting",
    [
        b'{"return": {}}\n',
        b'{"return": 12345}\n',
        b'half an answer without end \xff{"return": 1}\n',
        b"\n\n\xff\xff\n",
        b"[1, 2]\n",
        b'{"return": {"pid"',  # an answer that a restart of the agent cut off
    ],
)
def test_what_an_earlier_conversation_left_is_not_an_answer(peer: Peer, greeting: bytes) -> None:
    peer.greeting = greeting
    peer.statuses = [ended(b"mine")]
    assert peer.agent.run(["x"], timeout=5.0) == (0, b"mine")


def test_one_who_does_not_answer(peer: Peer) -> None:
    peer.silent = True
    began = time.monotonic()
    assert not peer.agent.ping(0.3)
    with pytest.raises(FailedError, match="does not answer"):
        peer.agent.run(["x"], timeout=0.3)
    assert 0.6 <= time.monotonic() - began < 3.0


def test_one_who_hangs_up(peer: Peer) -> None:
    peer.hangs_up = True
    assert not peer.agent.ping(5.0)
    with pytest.raises(FailedError, match="does not answer"):
        peer.agent.run(["x"], timeout=5.0)


def test_one_who_drips_does_not_outlast_the_deadline(peer: Peer) -> None:
    peer.piece, peer.delay = 1, 0.05
    began = time.monotonic()
    assert not peer.agent.ping(0.4)
    assert time.monotonic() - began < 2.0


def test_a_program_that_does_not_end(peer: Peer) -> None:
    peer.statuses = [{"exited": False}]
    began = time.monotonic()
    with pytest.raises(FailedError, match="/bin/forever did not end in the guest"):
        peer.agent.run(["/bin/forever"], timeout=0.5)
    assert 0.5 <= time.monotonic() - began < 3.0


def test_a_program_that_is_not_there(peer: Peer) -> None:
    peer.error = "Failed to execute child process (No such file or directory)"
    with pytest.raises(FailedError, match=r"refuses guest-exec: .*No such file"):
        peer.agent.run(["x"], timeout=5.0)


@pytest.mark.parametrize("answer", [b"no JSON", b"[]", b"{}", b'{"return": {}}'])
def test_an_answer_that_is_none(peer: Peer, answer: bytes) -> None:
    peer._answer = lambda request: (  # type: ignore[method-assign]
        Peer._answer(peer, request) if request["execute"].startswith("guest-sync") else answer + b"\n"
    )
    with pytest.raises(FailedError, match="guest agent"):
        peer.agent.run(["x"], timeout=5.0)


def test_nobody_listens(tmp_path: Path) -> None:
    agent = QemuGuestAgent(tmp_path / "none.sock")
    assert not agent.ping(1.0)
    with pytest.raises(FailedError, match="does not answer"):
        agent.run(["x"], timeout=1.0)
