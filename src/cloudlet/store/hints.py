"""What a site has learned of an overlay: which frames its guests asked for before their turn.

A list of frame numbers beside the overlay, unsigned: it says what to fetch first, and can change nothing of
what a frame contains.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

MOST_FRAMES = 1024
"""Frames that are remembered of one overlay."""


class HintStore:
    """The folder of hints."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, overlay_id: str, frames: int) -> list[int]:
        """The frames that guests asked for, of an overlay that has so many; none where nothing is known."""
        try:
            told = json.loads((self._folder / f"{overlay_id}.json").read_text())["frames"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        if not isinstance(told, list):
            return []
        known = [frame for frame in told if isinstance(frame, int) and 0 <= frame < frames]
        return list(dict.fromkeys(known))[:MOST_FRAMES]

    def add(self, overlay_id: str, frames: int, asked: Sequence[int]) -> None:
        """Remember the frames of one start: those that are new come first, and the oldest are forgotten."""
        known = self.of(overlay_id, frames)
        new = [frame for frame in asked if frame not in set(known)]
        together = list(dict.fromkeys([*new, *known]))[:MOST_FRAMES]
        if together == known:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"{overlay_id}.json"
        temporary = path.with_suffix(f".{secrets.token_hex(4)}.new")
        temporary.write_text(json.dumps({"frames": together}))
        temporary.replace(path)
