"""The process of a fake machine: it holds RAM, disk and sockets, and lets the guest run, or not.

One thread and three selectors. The outer one has the monitor. The inner one has all that the guest hears,
agent, console and, in a selector of their own, the web ports, and is itself in the outer one while the
machine runs. So a paused machine answers nothing but its monitor, and its bytes stand still; and ports alone
can be held. Killed, it is gone like a real one.
"""

from __future__ import annotations

import json
import mmap
import os
import selectors
import sys
from pathlib import Path
from typing import Any

from cloudlet.hypervisor.fake.agent import AgentEnd
from cloudlet.hypervisor.fake.connections import lines, serve
from cloudlet.hypervisor.fake.files import LEAST_PAGES, PAGE
from cloudlet.hypervisor.fake.guest import Guest
from cloudlet.hypervisor.fake.optical import read_image

DEVICES = (
    ("cpu", 0, 1),
    ("ram", 0, 1),
    ("disk", 0, 2),
    ("optical", 0, 1),
    ("generation", 0, 1),
    ("card", 0, 1),
    ("serial", 0, 1),
)
"""Name, instance and version of each device, in the order of the device state."""

_LONGEST_REQUEST = 1 << 16


class RefusedByMachineError(Exception):
    """The machine cannot do that now; the message says why."""


class Machine:
    """The machine."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._state = "incoming" if config["incoming"] else "paused"
        self._ended = False
        self._optical = ""
        self._printed = 0
        self._generation = config["generation"] or os.urandom(16).hex()
        self._outer, self._inner = selectors.DefaultSelector(), selectors.DefaultSelector()
        self._public = selectors.DefaultSelector()
        self._held = False
        serve(self._outer, config["monitor"], lambda: self._monitor)
        serve(self._inner, config["agent"], lambda: lines(self._agent_end.answer))
        serve(self._inner, config["console"], lambda: lines(self._type))
        for descriptor in config["listeners"]:
            serve(self._public, descriptor, lambda: self._http)
        self._inner.register(self._public, selectors.EVENT_READ, self._serve_public)

    def run(self) -> None:
        """Run until the power goes off."""
        if not self._config["incoming"]:
            self._load()
            self._guest.boot(self._generation)
            self._go()
        while not self._ended:
            for key, _ in self._outer.select():
                if key.fileobj is self._inner:
                    for inner, _ in self._inner.select(0):
                        inner.data()
                else:
                    key.data()

    def _serve_public(self) -> None:
        for key, _ in self._public.select(0):
            key.data()

    def _hold(self, hold: bool) -> None:
        """Leave the ports alone, or serve them again."""
        if hold and not self._held:
            self._inner.unregister(self._public)
        elif self._held and not hold:
            self._inner.register(self._public, selectors.EVENT_READ, self._serve_public)
        self._held = hold

    def _load(self) -> None:
        """Take RAM and disk as they are now."""
        ram, disk = _map(self._config["ram"]), _map(self._config["disk"])
        self._guest = Guest(ram, disk, self._print)
        self._agent_end = AgentEnd(self._guest)
        if self._config["optical"]:
            self._insert(self._config["optical"])

    def _go(self) -> None:
        if self._state != "running":
            self._outer.register(self._inner, selectors.EVENT_READ)
        self._state = "running"

    def _halt(self) -> None:
        if self._state == "running":
            self._outer.unregister(self._inner)
            self._state = "paused"

    def _monitor(self, content: bytes) -> tuple[bytes, bytes, bool]:
        line, newline, rest = content.partition(b"\n")
        if not newline:
            return b"", content, False
        try:
            request = json.loads(line)
            answer = {"return": self._do(request.pop("do"), **request)}
        except (RefusedByMachineError, OSError, ValueError) as error:
            answer = {"error": str(error)}
        return json.dumps(answer).encode() + b"\n", rest, True

    def _do(self, command: str, **arguments: Any) -> Any:
        match command:
            case "status":
                return self._state
            case "generation":
                return self._generation
            case "hold":
                self._hold(arguments["hold"])
            case "load" if self._state == "incoming":
                self._resume(arguments["state"], run=arguments["run"])
            case _ if self._state == "incoming":
                raise RefusedByMachineError(f"{command}: the machine waits for its state")
            case "pause":
                self._halt()
            case "run":
                self._go()
            case "save":
                return self._save()
            case "insert":
                if self._optical:
                    raise RefusedByMachineError("the optical drive is not empty")
                self._insert(arguments["image"])
            case "eject":
                self._optical = ""
                self._guest.insert(None)
            case "power":
                self._ended = self._state == "running"
            case _:
                raise RefusedByMachineError(f"{command} is not a command of the monitor")
        return None

    def _save(self) -> list[list[Any]]:
        content: dict[str, Any] = {
            "optical": self._optical,
            "generation": self._generation,
            "serial": self._printed,
        }
        return [[name, instance, version, content.get(name)] for name, instance, version in DEVICES]

    def _resume(self, state: list[list[Any]], *, run: bool) -> None:
        """Load the devices. The generation ID is this machine's own, as a hypervisor's is."""
        if [tuple(section[:3]) for section in state] != list(DEVICES):
            raise RefusedByMachineError("the device state is another machine's")
        content = {section[0]: section[3] for section in state}
        if content["optical"]:
            raise RefusedByMachineError("the optical drive was not empty when the machine was captured")
        self._printed = int(content["serial"])
        self._load()
        self._guest.go_on(self._generation)
        self._state = "paused"
        if run:
            self._go()

    def _insert(self, image: str) -> None:
        self._guest.insert(read_image(Path(image)))
        self._optical = image

    def _type(self, line: bytes) -> bytes:
        """A line typed at the console is a command for the guest's shell."""
        command = line.decode(errors="replace").strip()
        _, out, err = self._guest.run(["sh", "-c", command], b"")
        for text in (out + err).decode(errors="replace").splitlines():
            self._print(text)
        return out + err

    def _print(self, line: str) -> None:
        text = f"{line}\r\n".encode()
        self._printed += len(text)
        with Path(self._config["console_log"]).open("ab") as log:
            log.write(text)

    def _http(self, content: bytes) -> tuple[bytes, bytes, bool]:
        head, end, _ = content.partition(b"\r\n\r\n")
        if not end:
            return b"", content, len(content) > _LONGEST_REQUEST
        method, _, rest = head.decode("latin-1").partition(" ")
        status, body = self._guest.answer(rest.partition(" ")[0]) if method == "GET" else (405, b"only GET\n")
        answer = f"HTTP/1.1 {status} {'OK' if status == 200 else 'Not so'}\r\nContent-Length: {len(body)}\r\n"
        return answer.encode() + b"Connection: close\r\n\r\n" + body, b"", True


def main(config: str) -> None:
    """Run the machine that the JSON text describes."""
    Machine(json.loads(config)).run()
    sys.exit(0)


def _map(path: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    if len(memory) < LEAST_PAGES * PAGE:
        raise RefusedByMachineError(f"{path} is smaller than {LEAST_PAGES} pages, which the fake guest needs")
    return memory
