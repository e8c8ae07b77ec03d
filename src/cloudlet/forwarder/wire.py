"""The cable between the guest's card and the network process: frames, carried both ways.

QEMU's ``-netdev stream`` sends each Ethernet frame behind its length, a big-endian 32-bit number;
a tap device takes and gives one frame per system call. What the guest does not take stays in the
tap's queue, of bounded length, from which the kernel drops: its TCP knows what to do.
"""

import os
import socket
from contextlib import suppress

from cloudlet.forwarder.loop import READ, WRITE, Loop

_LONGEST = 65536 + 18  # bytes of a frame that a card can send at all
_BLOCK = 256 * 1024  # bytes read from QEMU at a time
_ROUND = 64  # frames read from the tap before somebody else has a turn


class Wire:
    """Carry frames between ``link``, the other end of QEMU's socket, and ``tap``, until it ends."""

    def __init__(self, loop: Loop, link: socket.socket, tap: int) -> None:
        self._loop = loop
        self._link = link
        self._tap = tap
        self._received = bytearray(_BLOCK)
        self._view = memoryview(self._received)
        self._count = 0  # bytes in it, an incomplete frame at most between two rounds
        self._unsent = memoryview(b"")
        link.setblocking(False)
        os.set_blocking(tap, False)
        loop.add(link.fileno(), READ, self._on_link)
        loop.add(tap, READ, lambda _events: self._to_guest())

    def _on_link(self, events: int) -> None:
        try:
            if events & WRITE:
                self._send(self._unsent)
            if events & ~WRITE:
                self._from_guest()
        except BlockingIOError:
            return
        except ConnectionError:  # QEMU has ended with frames unread
            self._loop.stop()

    def _from_guest(self) -> None:
        """Read what there is and put each complete frame on the tap."""
        count = self._link.recv_into(self._view[self._count :])
        if count == 0:
            self._loop.stop()
            return
        end, start, view = self._count + count, 0, self._view
        while end - start >= 4:
            stop = start + 4 + int.from_bytes(view[start : start + 4], "big")
            if stop - start > _LONGEST + 4:
                os.write(2, b"the guest's card does not send frames\n")
                self._loop.stop()
                return
            if stop > end:
                break
            with suppress(OSError):  # too short for a frame, or no room: lost, as on any network
                os.write(self._tap, view[start + 4 : stop])
            start = stop
        self._count = end - start
        view[: self._count] = bytes(view[start:end])

    def _to_guest(self) -> None:
        """Read some frames from the tap and send them at once."""
        frames = bytearray()
        try:
            for _ in range(_ROUND):
                frame = os.read(self._tap, _LONGEST)
                frames += len(frame).to_bytes(4, "big")
                frames += frame
        except BlockingIOError:
            pass
        try:
            self._send(memoryview(frames))
        except ConnectionError:
            self._loop.stop()

    def _send(self, frames: memoryview) -> None:
        """Send to QEMU; while something is left, leave the tap alone."""
        waited = bool(self._unsent)
        try:
            self._unsent = frames[self._link.send(frames) :] if frames else frames
        except BlockingIOError:
            self._unsent = frames
        if bool(self._unsent) != waited:
            self._loop.change(self._link.fileno(), READ if waited else READ | WRITE)
            self._loop.change(self._tap, READ if waited else 0)
