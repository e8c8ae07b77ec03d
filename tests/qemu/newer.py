"""A newer QEMU than this distribution's, unpacked from Debian 13's packages into the tests' own folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUITE = "trixie"
_PACKAGES = "qemu-system-x86,qemu-utils,seabios"
_START = """#!/bin/sh
exec {root}/usr/lib64/ld-linux-x86-64.so.2 --library-path {root}/usr/lib/x86_64-linux-gnu \\
  {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu -L {root}/usr/share/seabios "$@"
"""


def newer_qemu(kept: Path) -> Path:
    """A program that starts the newer QEMU, with its libraries and firmware; made when first asked for."""
    folder = kept / f"qemu-{SUITE}"
    program = folder / "qemu-system-x86_64"
    if not program.exists():
        building = kept / f".qemu-{SUITE}-{os.getpid()}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True, mode=0o755)
        subprocess.run(
            ["mmdebstrap", "--variant=extract", f"--include={_PACKAGES}", SUITE, str(building / "root")],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        # A machine's own user has to read it.
        (building / "root").chmod(0o755)
        start = building / program.name
        start.write_text(_START.format(root=folder / "root"))
        start.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    return program
