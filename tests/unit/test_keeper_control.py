"""What a keeper answers to who asks it for something, whatever happens."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudlet.errors import CloudletError
from cloudlet.hypervisor.qemu.sockets import connect
from cloudlet.keeper.control import SOCKET, Command, Control, Progress, read_status
from cloudlet.keeper.order import raised
from cloudlet.keeper.wire import Line


@contextmanager
def asked(folder: Path, what: str) -> Iterator[Line]:
    with closing(Line(connect(folder / SOCKET, timeout=10))) as line:
        line.send({"do": what})
        yield line


def answer(folder: Path, what: str) -> dict[str, Any]:
    with asked(folder, what) as line:
        return line.receive() or {}


def failing(error: Exception) -> Command:
    def command(_: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left"),
        (MemoryError(), "not enough memory"),
        (KeyError("x"), "a defect: KeyError"),
    ],
)
def test_whatever_goes_wrong_is_answered(tmp_path: Path, error: Exception, said: str) -> None:
    Control(tmp_path, {"save": failing(error)})
    got: CloudletError = raised(answer(tmp_path, "save")["error"])
    assert said in got.message


def test_a_status_that_cannot_be_written_is_told_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pause(_: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        control.tell(paused=True)
        return {}

    control = Control(tmp_path, {"pause": pause})
    with monkeypatch.context() as full:
        full.setattr(control, "_write", full_disk)
        with asked(tmp_path, "watch") as watching:
            assert (watching.receive() or {})["paused"] is False
            assert answer(tmp_path, "pause") == {"done": {}}
            assert (watching.receive() or {})["paused"] is True
    status = read_status(tmp_path)
    assert status and not status.paused
    control.tell(keep=False, received=1)
    status = read_status(tmp_path)
    assert status and status.paused


def test_nothing_is_done_for_who_has_gone_but_the_end(tmp_path: Path) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def save(_: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(10)
        return {}

    def note(message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        done.append(message["do"])
        return {}

    Control(tmp_path, {"save": save, "pause": note, "resume": note}, {"end": note})
    with asked(tmp_path, "save") as saving:
        assert begun.wait(10)
        with asked(tmp_path, "pause"), asked(tmp_path, "end"):
            time.sleep(0.1)
        go_on.set()
        assert saving.receive() == {"done": {}}
    assert answer(tmp_path, "resume") == {"done": {}}
    assert done == ["end", "resume"]
