"""The cable between the guest's card and the network process: frames, carried both ways.

QEMU's ``-netdev stream`` sends each Ethernet frame behind its length, a big-endian 32-bit number;
a tap device takes and gives one frame per system call. What the guest does not take stays in the
tap's queue, of bounded length, from which the kernel drops: its TCP knows what to do.

The gateway has a tap; where the guest is at a bridge, that has another one.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress

from cloudlet.forwarder.loop import READ, WRITE, Loop
from cloudlet.forwarder.uplink import Uplink, for_gateway

_LONGEST = 65536 + 18  # bytes of a frame that a card can send at all
_BLOCK = 256 * 1024  # bytes read from QEMU at a time
_ROUND = 64  # frames read from the tap before somebody else has a turn


class Wire:
    """Carry frames between ``link``, the other end of QEMU's socket, and the taps, until it ends."""

    def __init__(self, loop: Loop, link: socket.socket, gateway: int, uplink: Uplink | None = None) -> None:
        """Carry what is for the gateway to the tap ``gateway``, and what is for the bridge to ``uplink``."""
        self._loop = loop
        self._link = link
        self._gateway = gateway
        self._uplink = uplink
        self._taps = [gateway] if uplink is None else [gateway, uplink.tap]
        self._received = bytearray(_BLOCK)
        self._view = memoryview(self._received)
        self._count = 0  # bytes in it, an incomplete frame at most between two rounds
        self._unsent = memoryview(b"")
        link.setblocking(False)
        loop.add(link.fileno(), READ, self._on_link)
        for tap in self._taps:
            os.set_blocking(tap, False)
            loop.add(tap, READ, self._reader_of(tap))

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
        """Read what there is and put each complete frame where it belongs."""
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
            self._pass_on(view[start + 4 : stop])
            start = stop
        self._count = end - start
        view[: self._count] = bytes(view[start:end])

    def _pass_on(self, frame: memoryview) -> None:
        """Put a frame of the guest on a tap, or on both: one that is for all."""
        uplink = self._uplink
        with suppress(OSError):  # too short for a frame, or no room: lost, as on any network
            if uplink is None or for_gateway(frame):
                os.write(self._gateway, frame)
        with suppress(OSError):
            if uplink is not None and uplink.takes(frame):
                os.write(uplink.tap, frame)

    def _reader_of(self, tap: int) -> Callable[[int], None]:
        return lambda _events: self._to_guest(tap)

    def _to_guest(self, tap: int) -> None:
        """Read some frames from a tap and send them at once."""
        if self._unsent:
            return  # the other tap came first in the same round
        frames = bytearray()
        try:
            for _ in range(_ROUND):
                frame = os.read(tap, _LONGEST)
                frames += len(frame).to_bytes(4, "big")
                frames += frame
        except BlockingIOError:
            pass
        except OSError:
            self._unplug(tap)
        if self._uplink is not None and tap == self._uplink.tap and not self._uplink.awake:
            return
        try:
            self._send(memoryview(frames))
        except ConnectionError:
            self._loop.stop()

    def _unplug(self, tap: int) -> None:
        """Go on without the bridge: its tap was deleted by who runs the site."""
        os.write(2, b"the tap device at the bridge is gone\n")
        self._loop.remove(tap)
        self._taps.remove(tap)
        self._uplink = None

    def _send(self, frames: memoryview) -> None:
        """Send to QEMU; while something is left, leave the taps alone."""
        waited = bool(self._unsent)
        try:
            self._unsent = frames[self._link.send(frames) :] if frames else frames
        except BlockingIOError:
            self._unsent = frames
        if bool(self._unsent) != waited:
            self._loop.change(self._link.fileno(), READ if waited else READ | WRITE)
            for tap in self._taps:
                self._loop.change(tap, READ if waited else 0)
