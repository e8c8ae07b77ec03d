"""The connections of a fake machine's process: bytes come, an answer goes, nobody is waited for."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

_LONGEST_LINE = 64 << 20
_BLOCK = 1 << 16

Answer = Callable[[bytes], tuple[bytes, bytes, bool]]
"""Takes what has come; gives what to send, what is left for later, and whether the connection ends."""


def serve(selector: selectors.BaseSelector, descriptor: int, answer: Callable[[], Answer]) -> None:
    """Accept connections on a listening socket; ``answer`` gives each its own way to answer."""
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)

    def accept() -> None:
        try:
            peer, _ = listener.accept()
        except OSError:  # It hung up before we looked.
            return
        _Connection(selector, peer, answer())

    selector.register(listener, selectors.EVENT_READ, accept)


def lines(answer: Callable[[bytes], bytes]) -> Answer:
    """Answers to one line after the other."""

    def line_by_line(content: bytes) -> tuple[bytes, bytes, bool]:
        line, newline, rest = content.partition(b"\n")
        if not newline:
            return b"", content, False
        return answer(line), rest, False

    return line_by_line


class _Connection:
    """One peer: what has come and is not used, and what could not be sent yet."""

    def __init__(self, selector: selectors.BaseSelector, peer: socket.socket, answer: Answer) -> None:
        peer.setblocking(False)
        self._selector, self._peer, self._answer = selector, peer, answer
        self._come, self._waiting, self._last = b"", b"", False
        selector.register(peer, selectors.EVENT_READ, self.ready)

    def ready(self) -> None:
        try:
            if self._waiting:
                self._send()
            elif block := self._peer.recv(_BLOCK):
                self._use(block)
            else:
                self._close()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._close()

    def _use(self, block: bytes) -> None:
        self._come += block
        while self._come and not self._last:
            said, rest, self._last = self._answer(self._come)
            self._waiting += said
            if rest == self._come or len(rest) > _LONGEST_LINE:
                break
            self._come = rest
        self._send()

    def _send(self) -> None:
        while self._waiting:
            try:
                self._waiting = self._waiting[self._peer.send(self._waiting) :]
            except BlockingIOError:
                self._selector.modify(self._peer, selectors.EVENT_WRITE, self.ready)
                return
        self._selector.modify(self._peer, selectors.EVENT_READ, self.ready)
        if self._last:
            self._close()

    def _close(self) -> None:
        self._selector.unregister(self._peer)
        self._peer.close()
