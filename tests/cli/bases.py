"""Bases as a defect or another site would make them: changed, and named again by their content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudlet.store.bases import Description


def document(base: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((base / "base.json").read_text())
    return read


def write_document(base: Path, content: dict[str, Any]) -> None:
    """Replace it; the file may be a link to one that other tests use."""
    (base / "base.json").unlink()
    (base / "base.json").write_text(json.dumps(content))


def renamed(base: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The base with a changed description, under the identity that goes with it."""
    content = document(base)
    change(content["description"])
    write_document(base, content)
    return base.rename(base.parent / Description.from_json(content["description"]).identity)
