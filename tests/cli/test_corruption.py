"""A damaged overlay is refused with one line, whatever the damage is, and nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudlet.errors import ExitCode
from cloudlet.settings import Settings
from cloudlet.store.keyring import KeyRing
from tests.cli.conftest import Hello
from tests.cli.damage import KINDS, Kind, attempt, flipped, flips, signed, signer
from tests.cli.traces import running, traces
from tests.conftest import CommandLine, Finished

pytestmark = pytest.mark.qemu

SEED = 20240605


def refused(done: Finished, status: int) -> str:
    """The one line with which a command refused; it says what to do, in parentheses at its end."""
    assert done.status == status, done.err
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("cloudlet: ")
    assert line.endswith(")"), f"no advice in {line!r}"
    return line


def test_a_flipped_bit_anywhere_is_refused(hello: Hello, settings: Settings, tmp_path: Path) -> None:
    whole = hello.path.read_bytes()
    damaged = tmp_path / "damaged"
    for at, bit in flips(whole, 40, SEED):
        damaged.write_bytes(flipped(whole, at, bit))
        assert attempt(settings, damaged)[0] == ExitCode.INTEGRITY, f"bit {bit} of byte {at}"
        assert traces(settings, tmp_path) == []
    assert attempt(settings, hello.path) == (ExitCode.DONE, "")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_damage_is_refused(
    kind: Kind, hello: Hello, settings: Settings, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(kind.make(hello.path.read_bytes(), signer(settings)))
    status, said = attempt(settings, damaged)
    assert (status, "\n" in said) == (kind.status, False), said
    assert kind.says in said


def test_run_refuses_it_with_one_line(
    hello: Hello, settings: Settings, cloudlet: CommandLine, tmp_path: Path
):
    whole = hello.path.read_bytes()
    damaged = tmp_path / "damaged"
    for at, bit in flips(whole, 4, SEED + 1):
        damaged.write_bytes(flipped(whole, at, bit))
        refused(cloudlet("run", damaged), 7)
        assert traces(settings, tmp_path) == []
    for kind in KINDS:
        if kind.name in ("cut in half", "grows without end, signed", "later version", "base missing, signed"):
            damaged.write_bytes(kind.make(whole, signer(settings)))
            assert kind.says in refused(cloudlet("run", damaged), kind.status)
            assert traces(settings, tmp_path) == []


def test_an_unsigned_overlay_runs_only_on_demand(
    hello: Hello, settings: Settings, cloudlet: CommandLine, tmp_path: Path
) -> None:
    unsigned = tmp_path / "unsigned"
    unsigned.write_bytes(signed(hello.path.read_bytes(), None))
    assert "--allow-unsigned" in refused(cloudlet("run", unsigned), 7)
    with running(cloudlet, unsigned, "--allow-unsigned") as machine:
        assert machine.url.startswith("http://127.0.0.1:")


def test_a_key_has_to_be_trusted_first(
    hello: Hello, settings: Settings, cloudlet: CommandLine, tmp_path: Path
) -> None:
    elsewhere = KeyRing(tmp_path / "elsewhere")
    elsewhere.generate("publisher")
    (tmp_path / "publisher.pub").write_bytes(elsewhere.public_pem("publisher"))
    theirs = tmp_path / "theirs"
    theirs.write_bytes(signed(hello.path.read_bytes(), elsewhere.signer("publisher")))
    assert "key trust" in refused(cloudlet("run", theirs), 7)
    # What is signed by a key that nobody knows is not the same as what nobody signed.
    assert "key trust" in refused(cloudlet("run", theirs, "--allow-unsigned"), 7)
    assert cloudlet("key", "trust", "them", tmp_path / "publisher.pub").status == 0
    with running(cloudlet, theirs, "-f", "json"):
        pass
    assert cloudlet("key", "distrust", "them").status == 0
    refused(cloudlet("run", theirs), 7)
