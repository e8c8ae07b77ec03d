"""How large the parts of an overlay may be: one page, the same for the writer and for every reader.

A reader holds each declared size against these before it allocates or asks for a byte. The figures
bound the memory of whoever applies an overlay (``docs/formats/overlay.md``, Limits).
"""

from __future__ import annotations

ROOT_BYTES = 64 << 10
"""The signed root, in the file."""

FRAME_BYTES = 4 << 20
"""One frame, in the file as well as decompressed."""

FRAME_PAGES = 512
"""Pages in one frame: 2 MiB. Writers put fewer into it (``plan.py``)."""

CHUNK_FRAMES = 256
"""Frames in one index chunk: 12 KiB of table."""

MAP_BYTES = 16 << 20
"""All map frames, decompressed: two million runs of pages."""

DEVICE_BYTES = 16 << 20
"""All device frames, decompressed. QEMU's own is a quarter of a MiB."""

WINDOW_LITERALS = 16_384
"""How far back a page may refer to a literal of the same overlay: 64 MiB."""

NUMBER = 1 << 53
"""Integers of the root stay below this, so that every JSON reader keeps them exact."""
