"""ISO images for the optical drive: how files get into a guest that has no network.

Written by xorriso, with Rock Ridge names; all is root's, and the right to write is left out. A recipe's files
go in as numbered folders;
a cloud-init seed is a volume called ``cidata`` (cloud-init's NoCloud source).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cloudlet.errors import CapacityError, FailedError, NotFoundError


def write_iso(
    image: Path, tree: Mapping[str, Path], volume: str, environment: Mapping[str, str] | None = None
) -> None:
    """Make an ISO image.

    :param environment: what to add to the program's environment: the mark of the workspace it works for.
    :param tree: for each path on the medium, the file or folder whose content is there.
    :raises NotFoundError: xorriso is not installed.
    """
    program = shutil.which("xorriso")
    if not program:
        raise NotFoundError("xorriso is not installed", hint="apt-get install xorriso")
    command = [
        program, "-as", "mkisofs", "-quiet", "-r", "-J", "-joliet-long", "-V", volume,
        "-o", str(image), "-graft-points",
        *(f"{_escape(inside)}={_escape(str(outside))}" for inside, outside in tree.items()),
    ]  # fmt: skip
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    if result.returncode:
        if "No space left" in result.stderr or "exceeds free space" in result.stderr:
            raise CapacityError(f"no room for {image}", hint="free space there, or set --state-dir")
        lines = result.stderr.strip().splitlines()
        raise FailedError(f"xorriso failed: {lines[-1] if lines else result.returncode}")


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace("=", "\\=")
