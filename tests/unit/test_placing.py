"""Which peer could take which instance, which is first, and where it goes."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cloudlet.service.placing import Entry, Result, by_need, choose, obstacle
from cloudlet.store.rows import Instance, InstanceState, Peer

BASE = "a" * 64
OWN = {
    "versions": [1],
    "hypervisor": "qemu",
    "qemu": "7.2.1",
    "accelerator": "kvm",
    "cpu_model": "v3",
    "bases": [BASE],
}
BEGAN = datetime(2030, 1, 1, tzinfo=UTC)
DEADLINE = BEGAN + timedelta(seconds=600)


def peer(name: str, error: dict[str, str] | None = None, **different: Any) -> Peer:
    return Peer(
        id=name, project_id="", user_id="", name=name, url="", public_key="", fingerprint="",
        capabilities={**OWN, **different}, error=error,
    )  # fmt: skip


def instance(name: str, **more: Any) -> Instance:
    usual = {"state": InstanceState.ACTIVE, "memory_bytes": 1, "created_at": BEGAN}
    return Instance(
        id=name, project_id="", user_id="", name=name, base_identity=BASE, disk_bytes=1, cpus=1,
        **{**usual, **more},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (peer("same"), ""),
        (peer("more", versions=[2, 1], bases=["b" * 64, BASE], qemu="9.1"), ""),
        (peer("down", {"message": "nobody there"}), "it does not answer: nobody there"),
        (peer("newer", versions=[2]), "it speaks another version of the hand-off"),
        (peer("silent", versions=[]), "it speaks another version of the hand-off"),
        (peer("slow", accelerator="tcg"), "its accelerator is tcg, not kvm"),
        (peer("old", cpu_model=""), "its cpu_model is unknown, not v3"),
        (peer("fake", hypervisor="fake"), "its hypervisor is fake, not qemu"),
        (peer("bare", bases=["b" * 64]), "it has not the base aaaaaaaaaaaaaaaa"),
        (replace(peer("unasked"), capabilities={}), "it speaks another version of the hand-off"),
    ],
    ids=lambda value: value.name if isinstance(value, Peer) else "",
)
def test_what_keeps_a_peer_from_taking_an_instance(other: Peer, why: str) -> None:
    assert obstacle(OWN, other, instance("one")) == why


def test_those_that_need_it_most_are_first() -> None:
    soon, late = DEADLINE - timedelta(seconds=1), DEADLINE + timedelta(seconds=1)
    wanted = [
        (instance("few peers", expires_at=late), 1),
        (instance("large", memory_bytes=3), 2),
        (instance("small", memory_bytes=2), 2),
        (instance("small and young", memory_bytes=2, created_at=BEGAN + timedelta(seconds=1)), 2),
        (instance("ends by itself", memory_bytes=9, expires_at=soon), 1),
        (instance("paused", memory_bytes=9, state=InstanceState.PAUSED), 1),
    ]
    takers = {one.id: number for one, number in wanted}
    mixed = [one for one, _ in wanted]
    random.Random(1).shuffle(mixed)
    assert [one.id for one in by_need(mixed, takers, DEADLINE)] == [one.id for one, _ in wanted]


def test_they_are_spread_over_the_peers() -> None:
    peers = [peer("edge-2"), peer("edge-1")]
    entries: dict[str, Entry] = {}
    for number in range(5):
        entry = Entry(str(number), "", "active")
        chosen = choose(entry, peers, entries.values())
        result = Result.MOVING if number % 2 else Result.HANDED_OFF
        entries[entry.id] = replace(entry, result=result, peer_id=chosen.id)
    assert [entry.peer_id for entry in entries.values()] == ["edge-1", "edge-2", "edge-1", "edge-2", "edge-1"]


def test_one_that_failed_goes_to_another_peer_before_it_is_tried_again() -> None:
    peers = [peer("edge-1"), peer("edge-2")]
    entry = Entry("one", "", "active")
    tried = []
    for _ in range(4):
        chosen = choose(entry, peers, [])
        tried.append(chosen.id)
        entry = entry.failed(chosen.id, "the link was cut", final=False)
    assert tried == ["edge-1", "edge-2", "edge-1", "edge-2"]
    assert (entry.tried("edge-1"), entry.tried("edge-2"), entry.tried("edge-3")) == (2, 2, 0)


def test_a_report_is_read_as_it_was_written() -> None:
    moving = Entry("one", "app", "moving", Result.MOVING, "edge-1", "Edge 1", "handoff")
    entry = moving.failed("edge-1", "it is full", final=True)
    assert (entry.result, entry.peer_id, entry.handoff_id) == (Result.WAITING, None, None)
    for one in (moving, entry, entry.stays("nobody takes it")):
        assert Entry.from_json(one.to_json()) == one
