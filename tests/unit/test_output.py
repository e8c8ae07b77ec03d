from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloudlet.output import written


@pytest.fixture(params=[True, False], ids=["nameless", "with-a-hidden-name"])
def nameless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A file system as it is, and one that has no nameless files."""
    really = os.open

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        return really(path, flags, mode, dir_fd=dir_fd)

    if not request.param:
        monkeypatch.setattr(os, "open", opened)
    return bool(request.param)


def test_it_takes_the_place_when_it_is_whole(nameless: bool, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_bytes(b"before")
    with written(output) as file:
        file.write(b"after")
        file.flush()
        assert output.read_bytes() == b"before"
        assert len(list(tmp_path.iterdir())) == (1 if nameless else 2)
    assert output.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [output]


def test_an_error_leaves_nothing(nameless: bool, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written(tmp_path / "output") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_hidden_name_is_not_followed(
    nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "guessed")
    (tmp_path / ".output.guessed.new").symlink_to(victim)
    with pytest.raises(FileExistsError), written(tmp_path / "output") as file:
        file.write(b"content")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "output").exists()


def test_long_names_fit(nameless: bool, tmp_path: Path) -> None:
    output = tmp_path / ("x" * 255)
    with written(output) as file:
        file.write(b"content")
    assert output.read_bytes() == b"content"
