"""The guest agent's channel: commands in a guest without a network.

Protocol: QEMU's ``docs/interop/qemu-ga.rst``, JSON lines over a Unix socket. One connection at a time;
each conversation begins with ``guest-sync-delimited``, so that what an earlier one left is not mistaken
for an answer.
"""

from __future__ import annotations

import base64
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloudlet.errors import FailedError
from cloudlet.hypervisor.qemu.sockets import connect

_LONGEST_ANSWER = 64 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25
_LAST_ANSWER = 2.0
"""Seconds beyond a program's deadline for the agent to say that it has not ended."""


class QemuGuestAgent:
    """The agent in one guest."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ping(self, timeout: float) -> bool:
        """Whether the agent answers within ``timeout`` seconds."""
        try:
            with self._conversation(timeout) as talk:
                talk.call("guest-ping")
        except (FailedError, OSError):
            return False
        return True

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: bytes = b"",
        output: Callable[[bytes], None] | None = None,
    ) -> tuple[int, bytes]:
        """Run a program to its end; its exit status and its output.

        :param output: is given the output when the program has ended; the agent has none before.
        :raises FailedError: no agent answers, or the program does not end within ``timeout`` seconds.
        """
        arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        deadline = time.monotonic() + timeout
        with self._conversation(timeout + _LAST_ANSWER) as talk:
            pid = talk.call("guest-exec", **arguments)["pid"]
            pause = _FIRST_PAUSE
            while not (status := talk.call("guest-exec-status", pid=pid))["exited"]:
                if time.monotonic() > deadline:
                    raise FailedError(f"{argv[0]} did not end in the guest within {timeout:.0f} s")
                time.sleep(pause)  # The agent has no event for the end of a program.
                pause = min(_LONGEST_PAUSE, pause * 1.5)
            text = b"".join(base64.b64decode(status.get(stream, "")) for stream in ("out-data", "err-data"))
            ended = int(status.get("exitcode", 128 + int(status.get("signal", 0))))
        if output and text:
            output(text)
        return ended, text

    @contextmanager
    def _conversation(self, timeout: float) -> Iterator[_Talk]:
        try:
            with connect(self._path, timeout) as connection:
                talk = _Talk(connection, timeout)
                talk.synchronise()
                yield talk
        except (TimeoutError, ConnectionError, FileNotFoundError) as error:
            raise FailedError("the guest agent does not answer") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # A guest may answer anything.
            raise FailedError(f"the guest agent's answer is not understood: {error!r}") from error


class _Talk:
    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + timeout
        self._pending = bytearray()

    def synchronise(self) -> None:
        token = secrets.randbelow(1 << 31)
        # 0xFF makes the agent drop half a command that an earlier conversation may have left.
        self._connection.sendall(b"\xff" + self._command("guest-sync-delimited", {"id": token}))
        while True:
            line = self._line()
            try:
                answer = json.loads(line.rpartition(b"\xff")[2])
            except ValueError:
                continue
            if isinstance(answer, dict) and answer.get("return") == token:
                return

    def call(self, command: str, **arguments: Any) -> Any:
        self._connection.sendall(self._command(command, arguments))
        answer = json.loads(self._line())
        if "error" in answer:
            raise FailedError(f"the guest agent refuses {command}: {answer['error'].get('desc', '')}")
        return answer["return"]

    def _command(self, command: str, arguments: dict[str, Any]) -> bytes:
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        return json.dumps(message).encode() + b"\n"

    def _line(self) -> bytes:
        while b"\n" not in self._pending:
            left = self._deadline - time.monotonic()
            if left <= 0:  # also for one who never stops talking
                raise TimeoutError
            self._connection.settimeout(left)
            if not (more := self._connection.recv(1 << 16)):
                raise ConnectionError("the agent's channel was closed")
            self._pending += more
            if len(self._pending) > _LONGEST_ANSWER:
                raise FailedError("the guest agent's answer is too long")
        line, _, rest = bytes(self._pending).partition(b"\n")
        self._pending = bytearray(rest)
        return line
