"""Waiting until a guest is ready, by its rule, with a deadline and an eye on the machine's death.

A guest tells nobody when its application listens, so TCP and HTTP are asked, each try with a deadline
of its own: short at first, since a resumed application answers at once, longer later, since one that
boots under emulation may need seconds for its first answer.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cloudlet.errors import FailedError, UsageError
from cloudlet.hypervisor.driver import GuestAgent
from cloudlet.model import Endpoint, Readiness, ReadinessKind
from cloudlet.sparse import tail_of

FIRST_TRY, _LONGEST_TRY = 0.5, 10.0
WHILE_ARRIVING = 10.0
"""Seconds for the first question to a guest whose pages are still coming: it was heard, and to ask again
would only have the guest begin another answer, with pages of its own."""

_PAUSE = 0.01
_TAIL_BYTES = 1 << 16
_LONGEST_STATUS = 1024
_YES = ""
"""What a question is answered with when the rule holds; any other answer says why it does not yet."""


class Watched(Protocol):
    """What waiting needs of an instance."""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]: ...
    def accepts(self, endpoint: Endpoint, timeout: float) -> bool: ...
    @property
    def console_log(self) -> Path: ...
    @property
    def agent(self) -> GuestAgent | None: ...
    def wait(self, timeout: float | None = None) -> bool: ...


def wait_ready(
    instance: Watched,
    rule: Readiness,
    timeout: float,
    *,
    console_from: int = 0,
    first_try: float = FIRST_TRY,
) -> float:
    """Wait until the rule holds; the seconds it took.

    :param first_try: seconds for the first question, see `WHILE_ARRIVING`.
    :param console_from: for a ``serial:`` rule, where in the console log to begin, in bytes.
    :raises FailedError: it does not hold within ``timeout`` seconds, or the machine ended.
    """
    began = time.monotonic()
    ask = _question(instance, rule, console_from)
    patience = first_try
    while (said := ask(min(patience, max(0.05, began + timeout - time.monotonic())))) != _YES:
        if time.monotonic() - began > timeout:
            what = f"not ready ({rule}) after {timeout:.0f} s: {said}"
            raise FailedError(what, hint=_console_hint(instance))
        if instance.wait(_PAUSE):
            raise FailedError(f"the machine ended before it was ready ({rule})", hint=_console_hint(instance))
        patience = min(_LONGEST_TRY, patience * 1.5)
    return time.monotonic() - began


def guest_port(rule: Readiness) -> int | None:
    """The port that has to be published for a rule to be asked."""
    return rule.port if rule.kind in (ReadinessKind.TCP, ReadinessKind.HTTP) else None


def _question(instance: Watched, rule: Readiness, console_from: int) -> Callable[[float], str]:
    match rule.kind:
        case ReadinessKind.AGENT:
            agent = instance.agent
            if agent is None:
                raise UsageError("this machine has no guest agent channel")
            return lambda patience: _YES if agent.ping(patience) else "the agent does not answer"
        case ReadinessKind.SERIAL:
            pattern = re.compile(rule.pattern.encode(), re.MULTILINE)
            return lambda patience: _printed(instance.console_log, pattern, console_from, min(patience, 0.2))
        case ReadinessKind.TCP:
            endpoint = _endpoint(instance, rule.port)
            refused = f"nothing listens on port {rule.port} of the guest"
            return lambda patience: _YES if instance.accepts(endpoint, patience) else refused
        case ReadinessKind.HTTP:
            endpoint = _endpoint(instance, rule.port)
            return lambda patience: _answers(endpoint, rule.path, patience)


def _endpoint(instance: Watched, port: int) -> Endpoint:
    for endpoint in instance.endpoints:
        if endpoint.guest_port == port:
            return endpoint
    raise UsageError(f"port {port} of the guest is not published", hint=f"add port {port} to the ports")


def _answers(endpoint: Endpoint, path: str, patience: float) -> str:
    """Ask, and read no more than the status line; who drips or never ends does not outlast ``patience``."""
    deadline = time.monotonic() + patience
    address = (endpoint.host, endpoint.host_port)
    said = b""
    with suppress(OSError), socket.create_connection(address, patience) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: cloudlet\r\nConnection: close\r\n\r\n".encode())
        while b"\n" not in said and len(said) < _LONGEST_STATUS:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            if time.monotonic() > deadline or not (more := connection.recv(256)):
                break
            said += more
    match = re.match(rb"HTTP/1\.[01] (\d{3})", said)
    if not match:
        return "no answer"
    status = int(match[1])
    return _YES if 200 <= status < 400 else f"{path} answers with status {status}"


def _printed(log: Path, pattern: re.Pattern[bytes], start: int, patience: float) -> str:
    with suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        if pattern.search(file.read()):
            return _YES
    time.sleep(patience / 4)  # The console is a file that another process appends to.
    return "the console has not printed it"


def _console_hint(instance: Watched) -> str:
    with suppress(OSError):
        if lines := tail_of(instance.console_log).splitlines():
            return f"the console's last line: {lines[-1].strip()[:120]}"
    return "the console printed nothing"
