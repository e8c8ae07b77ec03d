"""Parts of files, copied between file systems too."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cloudlet.sparse import copy_some


@pytest.mark.parametrize("elsewhere", ["/dev/shm", "."])
def test_some_of_a_file(elsewhere: str, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "source").write_bytes(content)
    folder = tmp_path if elsewhere == "." else Path(elsewhere)
    with (tmp_path / "source").open("rb") as source, tempfile.TemporaryFile(dir=folder) as target:
        at, to, left = 4096, 8192, len(content)
        while count := copy_some(source.fileno(), target.fileno(), left, at, to):
            at, to, left = at + count, to + count, left - count
        assert at == len(content)
        target.seek(0)
        assert target.read() == bytes(8192) + content[4096:]
