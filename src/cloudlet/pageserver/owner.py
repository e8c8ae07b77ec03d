"""The line to the instance's owner: packets, none of which is ever waited for.

From the owner: ``A``, pages have come; ``T``, write down what was touched; ``F`` with an opening of
file 0, to read ahead with. To the owner: (u8 file, u64 page, u32 count), which a read waits for;
``T``, it is written down.
"""

# Of socket, only what is in C: the rest of it takes as long to import as all other modules together.
import _socket
import select
import struct

_WANTED = struct.Struct("<BQI")
_ROOM = _socket.CMSG_SPACE(4)
_DESCRIPTOR = struct.Struct("i")


class Owner:
    """The owner of the instance, as long as it lives."""

    def __init__(self, descriptor: int, epoll: select.epoll) -> None:
        self._socket = _socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self._descriptor = descriptor
        self._epoll = epoll
        self._epoll.register(descriptor, select.EPOLLIN)
        self._unsent: list[bytes] = []

    def receive(self) -> tuple[bytes, int]:
        """A packet, and the descriptor that came with it or -1; an empty one: there is no owner."""
        try:
            packet, extra, _, _ = self._socket.recvmsg(16, _ROOM)
        except OSError:
            return b"", -1
        return packet, _DESCRIPTOR.unpack(extra[0][2])[0] if extra else -1

    def want(self, number: int, first: int, count: int) -> None:
        """A read waits for these pages."""
        self.tell(_WANTED.pack(number, first, count))

    def tell(self, packet: bytes) -> None:
        """Send a packet, now or when there is room."""
        self._unsent.append(packet)
        self.send()

    def send(self) -> None:
        """Send what there is room for."""
        sent = 0
        try:
            for packet in self._unsent:
                self._socket.send(packet)
                sent += 1
        except BlockingIOError:
            pass
        except OSError:
            sent = len(self._unsent)  # there is no owner: that is seen where packets are received
        del self._unsent[:sent]
        awaited = select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0)
        self._epoll.modify(self._descriptor, awaited)

    def close(self) -> None:
        """There is no owner any more."""
        self._epoll.unregister(self._descriptor)
        self._socket.close()
