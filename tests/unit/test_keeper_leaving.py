"""What a peer says is cut to what may be written down, and users are led nowhere that it may not name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloudlet.keeper.correspondence import HttpPeer
from cloudlet.keeper.leaving import Leaving


class Answers:
    """A connection that answers always the same."""

    def __init__(self, said: dict[str, Any]) -> None:
        self._said = said

    def request(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(json={"handoff": self._said})

    def close(self) -> None: ...


def heard(**said: Any) -> Any:
    return HttpPeer(lambda: Answers({"state": "lost", **said}), "h").state()  # type: ignore[arg-type,return-value]


def test_what_a_peer_says_has_a_bound() -> None:
    place = {"guest_port": 80, "host": "10.0.0.1", "host_port": 8080}
    state = heard(
        reason="r" * 10**6,
        api_url="u" * 10**6,
        endpoints=[place] * 10**5,
        whatever="w" * 10**6,
        events_after=7,
    )
    assert len(json.dumps([state.told, state.reason])) < 10_000
    assert state.told["events_after"] == 7


def test_what_it_usually_says_is_heard_as_it_is() -> None:
    place = {
        "guest_port": 80,
        "host": "192.0.2.1",
        "host_port": 8080,
        "name": "http",
        "url": "http://192.0.2.1:8080",
    }
    state = heard(
        state="running", records=7, endpoints=[place], api_url="https://edge.example:8790", reason=""
    )
    assert (state.state, state.records) == ("running", 7)
    assert state.told["endpoints"] == [place]
    assert state.told["api_url"] == "https://edge.example:8790"


@pytest.mark.parametrize(
    ("peer", "address", "may"),
    [
        ("192.0.2.1", "192.0.2.1", True),  # the peer itself
        ("10.1.0.5", "10.1.0.5", True),
        ("10.1.0.5", "10.1.0.6", False),  # its neighbour, which is ours perhaps
        ("10.1.0.5", "10.9.0.6", True),  # a network that the operator allows
        ("10.1.0.5", "8.8.8.8", True),  # a public address
        ("10.1.0.5", "127.0.0.1", False),
        ("10.1.0.5", "169.254.169.254", False),
        ("127.0.0.1", "127.0.0.2", True),  # both sites are on this machine
        ("localhost", "127.0.0.2", True),
        ("127.0.0.1", "10.1.0.6", False),
    ],
)
def test_where_a_peer_may_lead_users(peer: str, address: str, may: bool, tmp_path: Path) -> None:
    site: Any = SimpleNamespace(settings=SimpleNamespace(fetch_networks=("10.9.0.0/16",)))
    leaving = Leaving(tmp_path, site, *[SimpleNamespace()] * 3)  # type: ignore[arg-type]
    leaving._whom = {"url": f"https://{peer}:8791"}
    assert leaving._may_lead_to(address) == may
