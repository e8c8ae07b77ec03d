"""What a site learns of an overlay is a list of frame numbers, and bad ones change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudlet.store.hints import MOST_FRAMES, HintStore

FRAMES = 10_000


@pytest.fixture
def hints(tmp_path: Path) -> HintStore:
    return HintStore(tmp_path / "hints")


def test_the_newest_come_first_and_none_twice(hints: HintStore) -> None:
    assert hints.of("one", FRAMES) == []
    hints.add("one", FRAMES, [5, 3, 5])
    hints.add("one", FRAMES, [3, 7])
    assert hints.of("one", FRAMES) == [7, 5, 3]
    assert hints.of("two", FRAMES) == []


def test_the_oldest_are_forgotten(hints: HintStore) -> None:
    hints.add("one", FRAMES, range(MOST_FRAMES))
    hints.add("one", FRAMES, [FRAMES - 1])
    known = hints.of("one", FRAMES)
    assert known[:2] == [FRAMES - 1, 0]
    assert len(known) == MOST_FRAMES


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"frames": 3}', '{"frames": ["a", -1, 10000, 1.5, null]}', "\x00"]
)
def test_what_is_no_list_of_frames_is_none(text: str, hints: HintStore, tmp_path: Path) -> None:
    hints.add("one", FRAMES, [1])
    (tmp_path / "hints" / "one.json").write_text(text)
    assert hints.of("one", FRAMES) == []
