"""The network process of an instance, as its site sees it: bound, started, adopted, stopped.

The site binds the published ports itself, in the host's network, so that a port that is taken is an
error before anything has been started, and a client can connect before anything serves it. It then
starts ``cloudlet.forwarder`` with the listening sockets and one end of a socket pair; the other end
is QEMU's network card. What the guest's network is, the forwarder's documentation says.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from cloudlet.errors import CloudletError, ConflictError, FailedError, RefusedError
from cloudlet.hypervisor.driver import Listener
from cloudlet.hypervisor.qemu.machine import PUBLIC_MAC
from cloudlet.hypervisor.records import ProcessId, start_time_of
from cloudlet.model import Endpoint, PublishedPort

MAX_CONNECTIONS = 256
"""Connections of an instance that are relayed at a time; further ones are closed at once."""

NOBODY = 65534
"""The user and group that a network process started by root becomes, unless told otherwise."""

_GUEST_ADDRESS_IN_TABLE = "0F02000A"  # 10.0.2.15, as /proc/net/tcp writes it
_ESTABLISHED = "01"
_LOOK_SECONDS = 0.02
_BACKLOG = 128  # connections that wait in the kernel until the process is there
_KEEPALIVE_SECONDS = 60  # of silence, before a client is asked whether it is still there
_ERRORS: dict[str, type[CloudletError]] = {"refused": RefusedError, "taken": ConflictError}
"""What the process's word for its failure means."""
_FORWARDER = Path(__file__).parents[2] / "forwarder" / "__main__.py"


@dataclass(frozen=True, slots=True)
class BoundPort:
    """A published port and its listening socket, which `start_network` hands over and closes."""

    guest_port: int
    name: str
    listener: socket.socket

    @property
    def endpoint(self) -> Endpoint:
        """Where clients connect; the host's port is the real one, also where 0 was asked for."""
        host, port, *_ = self.listener.getsockname()
        return Endpoint(self.guest_port, host, port, self.name)

    def close(self) -> None:
        """Give the port back."""
        self.listener.close()


def bind_ports(ports: Sequence[PublishedPort]) -> list[BoundPort]:
    """Bind and listen on all ``ports``, or on none.

    :raises ConflictError: a port is taken.
    :raises RefusedError: the user may not bind a port.
    :raises FailedError: an address is not one of this machine.
    """
    with ExitStack() as undo:
        bound = []
        for port in ports:
            listener = undo.enter_context(_listen(port))
            bound.append(BoundPort(port.guest_port, port.name, listener))
        undo.pop_all()
        return bound


def duplicates(bound: Sequence[BoundPort], on_error: ExitStack) -> list[Listener]:
    """The ports' endpoints, and their sockets once more: the owner's, whoever serves or closes the others."""
    listeners = []
    for port in bound:
        listener = port.listener.dup()
        on_error.callback(listener.close)
        listener.setblocking(False)  # as who serves them has it: that is one and the same
        listeners.append((port.endpoint, listener))
    return listeners


class NetworkProcess:
    """A network process, just started or adopted from a record of its pid and start time."""

    def __init__(self, pid: int, start_time: int) -> None:
        """Adopt the process that has ``pid`` and ``start_time`` (clock ticks since boot).

        If there is no such process any more, it counts as ended. A pid is never trusted alone.
        """
        self.pid = pid
        self.start_time = start_time
        self._qemu: socket.socket | None = None
        self._ready: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd: int | None = None
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(pid)
        # The process behind the descriptor cannot change any more, so this is no race.
        if self._pidfd is not None and not ProcessId(pid, start_time).alive():
            os.close(self._pidfd)
            self._pidfd = None

    @property
    def qemu_fd(self) -> int:
        """QEMU's end of the pair: give it to QEMU, at any time, then `close_qemu_fd`."""
        if self._qemu is None:
            raise ValueError("QEMU's end of the network is closed here, or was never held")
        return self._qemu.fileno()

    def close_qemu_fd(self) -> None:
        """Close QEMU's end here; as long as it is open, the network outlives QEMU."""
        if self._qemu is not None:
            self._qemu.close()
            self._qemu = None

    def wait_ready(self, deadline: float) -> None:
        """Wait until the guest's network serves; ``deadline`` is on the monotonic clock.

        After an error nothing is left of the process.

        :raises RefusedError: the user may not make a network namespace or a tap device.
        :raises ConflictError: another guest is at the bridge.
        :raises FailedError: the process ended, or the deadline passed.
        """
        if self._ready is None:
            return
        try:
            kind, *fields = _read_line(self._ready, deadline).split("\t")
            if kind != "ready":
                message, hint = fields
                error = _ERRORS.get(kind, FailedError)
                raise error(f"the guest's network did not start: {message}", hint=hint or None)
        except CloudletError:
            self.stop()
            raise
        finally:
            self._close_ready()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the process has ended, at most ``timeout`` seconds; whether it has."""
        if self._pidfd is None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else max(0.0, timeout) * 1000):
            return False
        os.close(self._pidfd)
        self._pidfd = None
        if self._child is not None:
            self._child.wait()
        return True

    def stop(self, patience: float = 2.0) -> None:
        """End the process and with it the network: ask, and after ``patience`` seconds do not ask.

        Closes what is held here of it. Can be called again.
        """
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
            if self.wait(0):
                break
            assert self._pidfd is not None
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            self.wait(seconds)
        self.release()

    def release(self) -> None:
        """Close what is held here and leave the process running, for `NetworkProcess` to adopt."""
        self.close_qemu_fd()
        self._close_ready()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._child is not None and self._child.poll() is None:
            # It may outlive this object, and where it does not, somebody has to fetch its status.
            name = f"network-{self.pid}"
            threading.Thread(target=self._child.wait, name=name, daemon=True).start()
            self._child = None

    def _close_ready(self) -> None:
        if self._ready is not None:
            os.close(self._ready)
            self._ready = None

    @classmethod
    def _started(cls, child: subprocess.Popen[bytes], qemu: socket.socket, ready: int) -> NetworkProcess:
        process = cls(child.pid, start_time_of(child.pid))
        process._child, process._qemu, process._ready = child, qemu, ready
        return process


def start_network(
    ports: Sequence[BoundPort],
    instance: str,
    log_fd: int,
    *,
    environment: Mapping[str, str] | None = None,
    uid: int = NOBODY,
    gid: int = NOBODY,
    max_connections: int = MAX_CONNECTIONS,
    bridge: str = "",
) -> NetworkProcess:
    """Start the network process of ``instance``; it is not ready yet (`NetworkProcess.wait_ready`).

    The listeners of ``ports`` are closed here, also after an error. The process writes to
    ``log_fd`` and has CLOUDLET_INSTANCE and ``environment`` as its only environment. ``uid`` and
    ``gid`` are what it becomes if this process is root's. ``bridge`` is the one of the site's network
    at which the guest is to be, if at any.
    """
    with ExitStack() as cleanup:
        for port in ports:
            cleanup.callback(port.close)
        on_error = cleanup.enter_context(ExitStack())
        qemu, link = socket.socketpair()
        on_error.callback(qemu.close)
        cleanup.callback(link.close)
        ready, theirs = os.pipe()
        on_error.callback(os.close, ready)
        cleanup.callback(os.close, theirs)
        inherited = [theirs, link.fileno()]
        arguments = [instance, PUBLIC_MAC, bridge, uid, gid, max_connections]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_FORWARDER), *map(str, [*arguments, *inherited])]
            + [f"{port.listener.fileno()}:{port.guest_port}" for port in ports],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env={"PATH": os.defpath, **(environment or {}), "CLOUDLET_INSTANCE": instance},
            pass_fds=[*inherited, *(port.listener.fileno() for port in ports)],
            start_new_session=True,
        )
        on_error.pop_all()
        return NetworkProcess._started(child, qemu, ready)


def guest_accepts(pid: int, endpoint: Endpoint, timeout: float) -> bool:
    """Whether the guest takes a connection to ``endpoint`` within ``timeout`` seconds.

    The network process ``pid`` takes it in any case, before it has asked the guest: whether the guest
    did shows in the process's own network, in the kernel's table of connections.
    """
    remote = f"{_GUEST_ADDRESS_IN_TABLE}:{endpoint.guest_port:04X}"
    deadline = time.monotonic() + timeout
    with suppress(OSError), socket.create_connection((endpoint.host, endpoint.host_port), timeout) as client:
        client.setblocking(False)
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                return bool(client.recv(1, socket.MSG_PEEK))  # nothing, and the end: the guest refused
            table = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
            if any(row.split()[2:4] == [remote, _ESTABLISHED] for row in table):
                return True
            time.sleep(_LOOK_SECONDS)
    return False


def _listen(port: PublishedPort) -> socket.socket:
    where = f"{port.host}:{port.host_port}"
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    try:
        address = (port.host, port.host_port)
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                raise ConflictError(
                    f"port {where} is taken", hint="choose another host port, or 0 for any free one"
                ) from error
            case errno.EACCES | errno.EPERM:
                raise RefusedError(
                    f"port {where} may not be bound by this user", hint="choose a port above 1023"
                ) from error
            case _:
                raise FailedError(f"port {where} cannot be bound: {error.strerror}") from error
    # What is set here, every accepted connection inherits.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
    return listener


def _read_line(ready: int, deadline: float) -> str:
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise FailedError("the guest's network did not start in time")
        block = os.read(ready, 4096)
        if not block:
            raise FailedError(
                "the network process ended before it was ready",
                hint="its reason is in the instance's log",
            )
        line += block
    return line.decode(errors="replace").rstrip("\n")
