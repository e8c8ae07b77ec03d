"""The fake guest's end of the agent channel: the part of QEMU's guest agent that a cloudlet speaks.

Protocol: QEMU's ``docs/interop/qemu-ga.rst``, so that the host's side is the same for both drivers. A
program has ended before its start is answered.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from cloudlet.hypervisor.fake.guest import Guest


class AgentEnd:
    """The agent; what programs gave stays until it is asked for."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._ended: dict[int, dict[str, Any]] = {}
        self._pids = 100

    def answer(self, line: bytes) -> bytes:
        """The answer to one line."""
        reset, line = b"\xff" in line, line.rpartition(b"\xff")[2]
        try:
            request = json.loads(line)
            arguments = request.get("arguments", {})
            reply = {"return": self._do(request["execute"], arguments)}
        except (ValueError, KeyError, TypeError, OSError) as error:
            reply = {"error": {"class": "GenericError", "desc": str(error)}}
        mark = b"\xff" if reset and "return" in reply else b""
        return mark + json.dumps(reply).encode() + b"\n"

    def _do(self, command: str, arguments: dict[str, Any]) -> Any:
        match command:
            case "guest-sync-delimited":
                return arguments["id"]
            case "guest-ping":
                return {}
            case "guest-exec":
                return {"pid": self._start(arguments)}
            case "guest-exec-status":
                return self._ended.pop(arguments["pid"])
        raise ValueError(f"The command {command} has not been found")

    def _start(self, arguments: dict[str, Any]) -> int:
        stdin = base64.b64decode(arguments.get("input-data", ""))
        argv = [arguments["path"], *arguments.get("arg", [])]
        status, out, err = self._guest.run(argv, stdin)
        self._pids += 1
        ended: dict[str, Any] = {"exited": True, "exitcode": status}
        for name, content in (("out-data", out), ("err-data", err)):
            if content:
                ended[name] = base64.b64encode(content).decode()
        self._ended[self._pids] = ended
        return self._pids
