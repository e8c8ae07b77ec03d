"""The life of a page server: answer what can be answered, leave the rest until it has come, end.

It is a process of the instance. It ends when nobody has its files any more, and when its owner dies
before all has come: with its descriptors the kernel ends the connections, so that nobody waits for
ever for pages that nobody brings. It blocks on nothing but its epoll.
"""

import errno
import os
import select
import time

from cloudlet.pageserver.content import Content
from cloudlet.pageserver.fuse import (
    DIRECT_IO,
    INTERRUPT,
    KEEP_CACHE,
    READ,
    RELEASE,
    Connection,
    EndedError,
    Request,
    interrupted,
    part_of,
)
from cloudlet.pageserver.kernel import give_up_rights, set_name
from cloudlet.pageserver.owner import Owner
from cloudlet.pageserver.state import PAGE_SHIFT, StateFile
from cloudlet.pageserver.touched import FirstTouches

_LOOK_SECONDS = 0.25
# Reads that wait while neighbours are still pushed. The kernel has room for 65535 in the background, and
# whoever asks for one more would have to wait; which a guest could bring about, and would harm itself.
_MOST_WAITING = 1024
_KILLED = 1 << 8  # SIGKILL among the pending signals of a thread

Waiting = tuple[int, int, float, int]
"""Offset, size, since when, and the thread that waits."""


def main(arguments: list[str]) -> int:
    """Run the page server to its end; 0 unless its owner died too early.

    UID PUSH_PAGES TOUCHED CONTROL STATE FUSE:SIZE:DELTA:BASE [FUSE:SIZE:DELTA:BASE]

    All but UID, PUSH_PAGES and SIZE are inherited descriptors; -1 stands for none.
    """
    uid, push_pages, touched, control, state = map(int, arguments[:5])
    set_name("cloudlet-pages")
    server = Server(StateFile(state), control, push_pages)
    for argument in arguments[5:]:
        server.add(*map(int, argument.split(":")))
    if touched >= 0:
        server.note_touches(touched)
    give_up_rights(uid)
    return server.run()


class Server:
    """Files, those who wait for their pages, and the owner who brings them."""

    def __init__(self, state: StateFile, control: int, push_pages: int) -> None:
        self._state = state
        self._epoll = select.epoll()
        self._control = control
        self._owner: Owner | None = Owner(control, self._epoll)
        self._connections: list[Connection] = []
        self._contents: list[Content] = []
        self._serving: dict[int, int] = {}
        self._waiting: dict[tuple[int, int], Waiting] = {}  # in the order in which they began to
        self._interrupted: set[tuple[int, int]] = set()
        self._touches: FirstTouches | None = None
        self._push_pages = push_pages
        self._ahead = -1
        self._self = os.getpid()

    def add(self, device: int, size: int, delta: int, base: int) -> None:
        """Serve one more file; the first one is mapped, others are only read."""
        number = len(self._connections)
        self._connections.append(Connection(device, size, DIRECT_IO if number else KEEP_CACHE))
        self._contents.append(Content(self._state.states[number], size, delta, base))
        self._serving[device] = number
        self._epoll.register(device, select.EPOLLIN)

    def note_touches(self, target: int) -> None:
        """Write down the order in which pages are first read."""
        self._touches = FirstTouches(target, [len(states) for states in self._state.states])

    def run(self) -> int:
        """Serve to the end; the exit status."""
        while self._serving:
            timeout = _LOOK_SECONDS if self._interrupted else None
            for descriptor, events in self._epoll.poll(timeout):
                if (number := self._serving.get(descriptor)) is not None:
                    self._serve(number)
                elif descriptor == self._control and not self._hear(events):
                    return 1
            if self._interrupted:
                self._let_go_of_the_dying()
        return 0

    # ------ what the kernel asks

    def _serve(self, number: int) -> None:
        connection = self._connections[number]
        try:
            request = connection.next()
        except EndedError:
            self._end(number)
            return
        if request is None:
            return
        if request[0] == READ:
            self._read(number, request)
            return
        connection.settle(request)
        if request[0] == RELEASE and number == 0:
            self._stop_pushing_unless_open()
        elif request[0] == INTERRUPT and (key := (number, interrupted(request[3]))) in self._waiting:
            self._interrupted.add(key)

    def _read(self, number: int, request: Request) -> None:
        _, unique, thread, body = request
        content = self._contents[number]
        offset, size = part_of(body)
        size = min(size, content.size - offset)
        if size <= 0:
            self._connections[number].answer(unique)
            return
        if self._touches:
            self._touches.note(number, offset, size)
        if missing := content.missing(offset, size):
            self._waiting[number, unique] = offset, size, time.monotonic(), thread
            self._show_waiting()
            if self._owner:
                self._owner.want(number, *missing)
            return
        self._answer(number, unique, offset, size)
        may_push = self._ahead >= 0 and len(self._waiting) < _MOST_WAITING
        if may_push and number == 0 and thread != self._self:
            self._push_around(offset)

    def _answer(self, number: int, unique: int, offset: int, size: int) -> None:
        connection = self._connections[number]
        try:
            part = self._contents[number].read(offset, size)
        except OSError as error:
            connection.refuse(unique, error.errno or errno.EIO)
            return
        self._state.count_read()  # before: who got an answer finds it counted
        connection.answer(unique, part)

    def _push_around(self, offset: int) -> None:
        """Have the kernel read the neighbours that are here, so that they need no fault of their own.

        It asks for them with ordinary reads, in the background. It could be given them unasked
        (FUSE_NOTIFY_STORE), but that waits, deaf to SIGKILL, for a page that another thread has just
        asked for; whose request then nobody reads.
        """
        first = (offset >> PAGE_SHIFT) // self._push_pages * self._push_pages
        for start, after in self._contents[0].present(first, first + self._push_pages):
            where, size = start << PAGE_SHIFT, (after - start) << PAGE_SHIFT
            os.posix_fadvise(self._ahead, where, size, os.POSIX_FADV_WILLNEED)

    def _end(self, number: int) -> None:
        device = self._connections[number].device
        self._epoll.unregister(device)
        os.close(device)
        del self._serving[device]
        for key in [key for key in self._waiting if key[0] == number]:
            self._forget(key)

    # ------ who waits

    def _answer_waiting(self) -> None:
        for key, (offset, size, since, _) in list(self._waiting.items()):
            number, unique = key
            if self._contents[number].missing(offset, size) is None:
                self._forget(key)
                self._state.count_stall(time.monotonic() - since)
                self._answer(number, unique, offset, size)

    def _let_go_of_the_dying(self) -> None:
        """Answer those with an error that were interrupted in order to end them.

        Others must go on to wait: a page fault that fails because of a mere signal ends the machine. The
        kernel tells of the first signal only, so a killing one that follows has to be looked for.
        """
        for key in list(self._interrupted):
            if _is_dying(self._waiting[key][3]):
                self._forget(key)
                self._connections[key[0]].refuse(key[1], errno.EINTR)

    def _forget(self, key: tuple[int, int]) -> None:
        del self._waiting[key]
        self._interrupted.discard(key)
        self._show_waiting()

    def _show_waiting(self) -> None:
        oldest = next(iter(self._waiting.values()), None)
        self._state.show_waiting(len(self._waiting), oldest[2] if oldest else 0.0)

    # ------ what the owner says

    def _hear(self, events: int) -> bool:
        """Read what the owner says, and send what it had no room for; whether to go on."""
        assert self._owner
        if events & select.EPOLLOUT:
            self._owner.send()
        if not events & ~select.EPOLLOUT:
            return True
        packet, descriptor = self._owner.receive()
        match packet:
            case b"A":
                self._answer_waiting()
            case b"T":
                if self._touches:
                    self._touches.flush()
                self._owner.tell(packet)
            case b"F":
                self._ahead = descriptor
            case b"":
                self._owner.close()
                self._owner = None
                self._stop_pushing_unless_open()
                return self._state.complete
        return True

    def _stop_pushing_unless_open(self) -> None:
        """Close our own opening when it is the last, or the connection would never end."""
        if self._ahead >= 0 and self._connections[0].opened <= 1:
            os.close(self._ahead)
            self._ahead = -1


def _is_dying(thread: int) -> bool:
    try:
        # As bytes: a codec would be imported now, which who gave up its rights may not be able to read.
        with open(f"/proc/{thread}/status", "rb") as file:  # noqa: PTH123
            for line in file:
                if line.startswith(b"SigPnd:"):
                    return bool(int(line.split()[1], 16) & _KILLED)
    except OSError:
        pass
    return False
