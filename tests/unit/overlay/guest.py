"""A machine whose pages arrive in whatever order somebody hands over the parts of its overlay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

from cloudlet.overlay.arrival import Arrival, Part, PartKind
from cloudlet.overlay.pages import Space
from cloudlet.overlay.table import FrameTable

from .world import Rebuilt, World, unsigned


class Guest:
    """A machine whose pages come from an arrival, and that takes each page once."""

    def __init__(self, world: World, data: bytes, spool: int) -> None:
        reader = unsigned(data)
        self.data = data
        self.root = reader.root
        self.size = reader.header.file_bytes
        self.table = FrameTable(reader.header, reader.root)
        self.arrival = Arrival(reader.header, reader.root, world.base, spool)
        self.pages = {Space.RAM: world.ram.copy(), Space.DISK: world.disk.copy()}
        self.built: dict[Space, set[int]] = {space: set() for space in Space}

    def blob(self, part: Part) -> bytes:
        return self.data[part.place.offset : part.place.offset + part.place.size]

    def take(self, part: Part, blob: bytes | None = None) -> int:
        """Take a part as it is in the file; how many pages came of it."""
        before = sum(map(len, self.built.values()))
        for batch in self.arrival.take(part, self.blob(part) if blob is None else blob):
            new = set(batch.numbers.tolist())
            assert len(new) == batch.numbers.size == len(batch.data)
            assert not new & self.built[batch.space]
            self.built[batch.space] |= new
            self.pages[batch.space][batch.numbers] = batch.data
        built = sum(map(len, self.built.values()))
        assert self.arrival.pages_missing == self.root.totals.pages - built
        return built - before

    def chunk(self, number: int) -> Part:
        part = Part(PartKind.CHUNK, number, self.table.chunk_place(number))
        self.table.add_chunk(number, self.blob(part))
        return part

    def frame(self, number: int) -> Part:
        return Part(PartKind.FRAME, number, self.table.place(number))

    def prefix(self) -> None:
        """Take what stands before the first chunk."""
        for number in range(len(self.root.listed_frames)):
            self.take(self.frame(number))

    def tables(self) -> None:
        for number in range(len(self.root.chunks)):
            self.take(self.chunk(number))

    def ask(self, space: Space, number: int) -> int:
        """Do what ``needed`` says until it says nothing more; the number of parts that it took."""
        taken = 0
        while parts := self.arrival.needed(space, number):
            assert len(set(parts)) == len(parts)
            for part in parts:
                self.take(part)
            taken += len(parts)
            assert taken <= 6
        return taken

    def rest(self) -> None:
        """Take what is missing in file order."""
        while part := self.arrival.next_part():
            assert not self.arrival.complete
            self.take(part)

    def check(self, whole: Rebuilt) -> None:
        """All is here, and as ``apply`` made it."""
        assert self.arrival.complete
        assert self.arrival.device_state == whole.device
        assert self.built == {space: set(came) for space, came in whole.came.items()}
        assert (self.pages[Space.RAM] == whole.ram).all()
        assert (self.pages[Space.DISK] == whole.disk).all()


@contextmanager
def guest_of(world: World, data: bytes) -> Iterator[Guest]:
    with TemporaryFile() as spool:
        yield Guest(world, data, spool.fileno())
