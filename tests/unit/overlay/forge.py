"""Overlays as an attacker or a defect would make them: taken apart, changed, and put together again
with every digest and sum right, so that only the check that a test is about can refuse them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from cloudlet.overlay import canonical
from cloudlet.overlay.frames import FrameEntry, FrameKind, Packer, Unpacker, pack_chunk
from cloudlet.overlay.reader import Frame
from cloudlet.overlay.root import Root
from cloudlet.overlay.sign import write_head

from .world import unsigned


@dataclass
class Forged:
    """An overlay in parts: root and all frames, in file order."""

    root: Root
    frames: list[tuple[FrameEntry, bytes]]

    @classmethod
    def of(cls, data: bytes) -> Forged:
        reader = unsigned(data)
        frames = [(p.entry, p.blob) for p in reader.parts() if isinstance(p, Frame)]
        return cls(reader.root, frames)

    def raw(self, at: int) -> bytearray:
        return bytearray(Unpacker().unpack(*self.frames[at], "frame"))

    def set_raw(self, at: int, raw: bytes, **changes: int) -> None:
        """Replace a frame's content; its pages and literals are kept unless said otherwise."""
        old = self.frames[at][0]
        entry, blob = Packer(3).pack(old.kind, bytes(raw), old.pages, old.literals)
        self.frames[at] = (replace(entry, **changes), blob)

    def set_blob(self, at: int, blob: bytes, **changes: int) -> None:
        """Replace a frame's bytes in the file."""
        old = self.frames[at][0]
        entry = replace(old, size=len(blob), digest=blake3(blob).digest())
        self.frames[at] = (replace(entry, **changes), blob)

    def data(
        self,
        totals: dict[str, int] | None = None,
        edit: Callable[[dict[str, Any]], None] = lambda _: None,
        hot: int | None = None,
    ) -> bytes:
        """The file. Sums follow the frames except for ``totals``; ``edit`` may change the root's JSON."""
        kinds = {k: [f for f in self.frames if f[0].kind is k] for k in (FrameKind.MAP, FrameKind.DEVICE)}
        pages = [f for f in self.frames if f[0].kind.is_pages]
        warm = len(self.root.hot_frames) if hot is None else hot
        chunk, table = pack_chunk([entry for entry, _ in pages[warm:]])
        brought = {k: sum(e.pages for e, _ in pages if e.kind is k) for k in (FrameKind.RAM, FrameKind.DISK)}
        sums = {
            "device_bytes": sum(e.raw_size for e, _ in kinds[FrameKind.DEVICE]),
            "frames": len(self.frames),
            "literals": sum(e.literals for e, _ in pages),
            "ram_pages": brought[FrameKind.RAM],
            "disk_pages": brought[FrameKind.DISK],
        } | (totals or {})
        root = replace(
            self.root,
            map_frames=tuple(e for e, _ in kinds[FrameKind.MAP]),
            device_frames=tuple(e for e, _ in kinds[FrameKind.DEVICE]),
            hot_frames=tuple(e for e, _ in pages[:warm]),
            chunks=(chunk,) if pages[warm:] else (),
            totals=replace(self.root.totals, **sums),
        )
        value = canonical.decode(root.encode(), "root")
        edit(value)
        out = io.BytesIO()
        write_head(out, canonical.encode(value), root.parts_bytes, None)
        for _, blob in (*kinds[FrameKind.MAP], *kinds[FrameKind.DEVICE], *pages[:warm]):
            out.write(blob)
        if pages[warm:]:
            out.write(table)
        for _, blob in pages[warm:]:
            out.write(blob)
        return out.getvalue()
