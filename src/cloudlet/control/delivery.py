"""Delivery: the pages of an overlay on their way into a machine that may already run.

One thread takes the overlay's parts in file order, as they stream in; another fetches, by range, those that
hold a page the guest waits for. Whatever comes is verified, built and handed over at once. What one of the
two is getting the other leaves to it, so what is asked for twice is sent once. A third looks at the clock: a
guest does not wait for ever, and nothing here asks the machine.

An error ends the machine: it cannot go on without the page that will not come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cloudlet.errors import CloudletError, CorruptError, FailedError, TruncatedError
from cloudlet.hypervisor.driver import Arriving
from cloudlet.overlay.arrival import Arrival, Part, PartKind
from cloudlet.overlay.pagemap import PageMap
from cloudlet.overlay.pages import Numbers, Space
from cloudlet.overlay.reader import Progress
from cloudlet.transfer.resource import WholeOnlyError
from cloudlet.transfer.source import Source

PATIENCE = 60.0
"""Longest time that a guest waits for a page, or nothing comes from the source, in seconds."""

_NEAR_BYTES = 64 << 10
"""What the stream brings so soon is not worth a request of its own, unless the stream stands still."""
_STANDS_SECONDS = 1.0
_LOOK_SECONDS = 0.25


class Delivery:
    """The delivery of one overlay, of which the head has been read from ``source``."""

    def __init__(
        self,
        source: Source,
        arrival: Arrival,
        total: int,
        *,
        patience: float = PATIENCE,
        hints: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        self.error: BaseException | None = None
        """Why the delivery, and with it the machine, ended."""
        self.asked: list[int] = []
        """The frames that were fetched before their turn because the guest waited, in order."""
        self._source = source
        self._arrival = arrival
        self._total = total
        self._patience = patience
        self._hints = list(hints)
        self._progress = progress
        self._incoming: Arriving | None = None
        self._changed = threading.Condition()
        self._wanted: dict[tuple[Space, int], None] = {}
        self._fetching: set[Part] = set()
        self._streaming: Part | None = None
        self._stream_at = (0, time.monotonic())
        self._closed = False
        self._threads: list[threading.Thread] = []

    def take_head(self) -> tuple[PageMap, bytes]:
        """Take, in order, what must be there before there can be a machine: the map and the device state."""
        arrival = self._arrival
        while arrival.page_map is None or arrival.device_state is None:
            part = arrival.next_part()
            assert part is not None
            arrival.take(part, self._read(part))
        return arrival.page_map, arrival.device_state

    def wanted(self, space: Space, numbers: Numbers) -> None:
        """Note which pages the guest waits for."""
        with self._changed:
            self._wanted.update(((space, int(number)), None) for number in numbers)
            self._changed.notify_all()

    def deliver(self, incoming: Arriving, arrived: Callable[[], None]) -> None:
        """Go on in threads of our own; ``arrived`` is called when all is there."""
        self._incoming = incoming
        work: dict[str, Callable[[], None]] = {"stream": lambda: self._stream(arrived), "watch": self._watch}
        if self._source.ranged:
            work["fetch"] = self._fetch
        for name, run in work.items():
            thread = threading.Thread(target=self._guarded, args=(run,), name=f"delivery-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait_hot(self) -> None:
        """Wait until the hot prefix is there.

        :raises CloudletError: the delivery ended before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._arrival.hot_here)
            if self.error:
                raise self.error

    def close(self) -> None:
        """Stop; nothing is handed over after this. Can be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._source.close()
        for thread in self._threads:
            thread.join()

    def _stream(self, arrived: Callable[[], None]) -> None:
        while (part := self._next()) is not None:
            if part.place.offset != self._source.offset:
                self._source.seek(part.place.offset)
            self._take(part, self._read(part))
        if self._closed:
            return
        if self._goes_on():
            raise CorruptError(f"the file goes on after its end at offset {self._total}")
        if not self._arrival.complete:
            raise CorruptError(f"{self._arrival.pages_missing} pages of the map did not come")
        assert self._incoming and self._arrival.device_state is not None
        self._incoming.received(self._total, self._total)
        self._incoming.finish(self._arrival.device_state)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        arrived()

    def _goes_on(self) -> bool:
        """Whether there is anything behind the last part, where the stream stands there."""
        if self._source.offset != self._total:
            return False
        try:
            return bool(self._source.read(1))
        except CloudletError:
            return False  # a server that does not end its answer well has brought it whole

    def _next(self) -> Part | None:
        """The next part in file order, unless it is being fetched: then wait for that."""
        with self._changed:
            while not self._closed:
                part = self._arrival.next_part()
                if part is None or part not in self._fetching:
                    self._streaming = part
                    return part
                self._changed.wait()
        return None

    def _fetch(self) -> None:
        while (found := self._choose()) is not None:
            part, waited_for = found
            with self._until_taken(part):
                try:
                    blob = self._source.fetch(part.place.offset, part.place.size)
                except WholeOnlyError:
                    return  # the stream brings it in its turn
                self._take(part, blob)
            if waited_for and part.kind is PartKind.FRAME:
                self.asked.append(part.number)

    def _choose(self) -> tuple[Part, bool] | None:
        """The part to fetch next, and whether the guest waits for it; waits until there is one."""
        with self._changed:
            while not self._closed:
                waited_for = self._waited_for()
                if (part := waited_for or self._hinted()) is not None:
                    self._fetching.add(part)
                    return part, waited_for is not None
                self._changed.wait(_LOOK_SECONDS if self._wanted else None)
        return None

    def _waited_for(self) -> Part | None:
        for space, number in list(self._wanted):
            parts = self._arrival.needed(space, number)
            if not parts and self._arrival.is_built(space, number):
                del self._wanted[space, number]
            for part in parts:
                if part not in self._fetching and not self._is_streamed_soon(part):
                    return part
        return None

    def _is_streamed_soon(self, part: Part) -> bool:
        """Whether the stream is about to bring a part; one that stands still is not."""
        offset, now = self._source.offset, time.monotonic()
        if offset != self._stream_at[0]:
            self._stream_at = offset, now
        if now - self._stream_at[1] > _STANDS_SECONDS:
            return False
        return part == self._streaming or 0 <= part.place.offset - offset < _NEAR_BYTES

    def _hinted(self) -> Part | None:
        while self._hints and self._arrival.hot_here:
            part = self._arrival.part_of_frame(self._hints[0])
            if part is not None and part not in self._fetching and part != self._streaming:
                return part
            del self._hints[0]
        return None

    def _watch(self) -> None:
        assert self._incoming
        while not self._closed_within(_LOOK_SECONDS):
            received = min(self._source.received, self._total)
            self._incoming.received(received, self._total)
            if self._progress:
                self._progress(received, self._total)
            since = self._incoming.progress().waiting_since
            if since is not None and time.monotonic() - since > self._patience:
                raise FailedError(
                    f"the guest has waited {self._patience:.0f} s for a page that does not come",
                    hint="the link or the server is too slow; --patience waits longer",
                )

    def _closed_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, seconds)

    @contextmanager
    def _until_taken(self, part: Part) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._fetching.discard(part)
                self._changed.notify_all()

    def _take(self, part: Part, blob: bytes) -> None:
        assert self._incoming
        with self._changed:
            if self._closed:
                return
            for batch in self._arrival.take(part, blob):
                self._incoming.pages(batch)
            self._changed.notify_all()

    def _read(self, part: Part) -> bytes:
        """The bytes of a part at which the stream stands."""
        pieces, missing = [], part.place.size
        while missing:
            piece = self._source.read(missing)
            if not piece:
                raise TruncatedError(
                    f"the file ends at offset {self._source.offset}, before {part.kind} {part.number}"
                )
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:  # raised where somebody waits for the machine
            with self._changed:
                if self._closed:
                    return
                self.error, self._closed = error, True
                self._changed.notify_all()
            assert self._incoming
            self._incoming.sever()
