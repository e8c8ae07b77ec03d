"""The bases of a site: their names and identities, and exports that someone else made."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from cloudlet.errors import (
    CorruptError,
    IntegrityError,
    LimitError,
    NotFoundError,
    UsageError,
)
from cloudlet.model import LARGEST_DISK_BYTES, Accelerator, Machine, Readiness
from cloudlet.overlay import canonical
from cloudlet.overlay.limits import DEVICE_BYTES
from cloudlet.overlay.root import DeviceSection
from cloudlet.sparse import CHUNK_BYTES
from cloudlet.store import bases as store
from cloudlet.store import exchange
from cloudlet.store.bases import Base, BaseStore, Description, Guest, check_name
from cloudlet.store.exchange import Export

MACHINE = Machine("pc-q35-7.2", Accelerator.TCG, "Nehalem", 1, 8192, 4096)
CREATED = "2026-01-01T00:00:00Z"


@pytest.fixture
def bases(tmp_path: Path) -> BaseStore:
    return BaseStore(tmp_path / "bases")


def add(bases: BaseStore, name: str, *, content: bytes = b"x", created: str = CREATED) -> Base:
    with bases.workspace() as workspace:
        (workspace.path / store.DISK).write_bytes(content.ljust(4096, b"\0"))
        (workspace.path / store.RAM).write_bytes(bytes(8192))
        (workspace.path / store.DEVICE_STATE).write_bytes(b"state")
        description = bases.describe(
            workspace.path,
            machine=MACHINE,
            sections=(DeviceSection("ram", 0, 4),),
            cmdline="console=ttyS0",
            ready=Readiness.parse("agent"),
            guest=Guest(agent=True, clone_agent=False, quiet=False),
        )
        return bases.adopt(workspace.path, description, name, created)


def at(base: Base, moment: int) -> None:
    """Give it another time of adoption: two within one tick of the clock are not told apart."""
    os.utime(base.path / "base.json", ns=(moment, moment))


def test_an_identity_wins_over_any_name(bases: BaseStore) -> None:
    one, other = add(bases, "one"), add(bases, "other", content=b"y")
    assert bases.find(one.id).id == bases.get(one.id).id == one.id
    assert bases.find(other.id[:12]).id == other.id
    # As an older program could have written it.
    document = (other.path / "base.json").read_text()
    (other.path / "base.json").write_text(document.replace('"other"', f'"{one.id}"'))
    assert bases.find(one.id).id == one.id


@pytest.mark.parametrize("reference", ["one", "", "..", "a" * 64])
def test_only_a_whole_identity_is_got(reference: str, bases: BaseStore) -> None:
    one = add(bases, "one")
    for wrong in (reference, one.id[:63], one.id.upper()):
        with pytest.raises(NotFoundError):
            bases.get(wrong)


@pytest.mark.parametrize("name", ["", ".x", "a b", "a/b", "x" * 65, "deadbeefdeadbeef", "A" * 16, "a\n", "ü"])
def test_names_that_no_base_may_have(name: str, bases: BaseStore) -> None:
    with pytest.raises(UsageError, match=r"--name|another"):
        check_name(name)
    with pytest.raises(UsageError):
        add(bases, name)
    assert bases.all() == []


@pytest.mark.parametrize("name", ["debian-12", "a", "deadbeef", "debian-9dc0975bf6707148", "x" * 64])
def test_names_that_one_may_have(name: str, bases: BaseStore) -> None:
    assert add(bases, name).name == name


def test_of_one_name_the_last_taken_in_here_is_meant(bases: BaseStore) -> None:
    first = add(bases, "one", created="2099-01-01T00:00:00Z")
    at(first, 1)
    second = add(bases, "one", content=b"y")
    assert bases.find("one").id == second.id
    assert [base.id for base in bases.all()] == [first.id, second.id]
    # Taken in again it is the last; its date is still its own.
    at(second, 2)
    assert add(bases, "one", created=CREATED).created == "2099-01-01T00:00:00Z"
    assert bases.find("one").id == first.id


def exported(base: Base, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """An export whose document was changed by somebody who knows the format."""
    path = folder / "export"
    exchange.export_base(base, path)
    data = path.read_bytes()
    start = len(exchange.MAGIC) + 4
    end = start + int.from_bytes(data[start - 4 : start], "little")
    document = canonical.decode(data[start:end], "document")
    change(document)
    head = canonical.encode(document)
    head = exchange.MAGIC + len(head).to_bytes(4, "little") + head
    path.write_bytes(head + blake3(head).digest() + data[end + 32 :])
    return path


def test_an_export_is_taken(bases: BaseStore, tmp_path: Path) -> None:
    base = add(bases, "one")
    path = exported(base, tmp_path, lambda document: document.update(created="2099-01-01T00:00:00Z"))
    other = BaseStore(tmp_path / "elsewhere")
    taken = exchange.import_base(other, path, None)
    assert taken
    assert (taken.id, taken.name, taken.created) == (base.id, "one", "2099-01-01T00:00:00Z")
    renamed = exchange.import_base(other, path, "two")
    assert renamed
    assert [one.name for one in other.all()] == ["two"]


def test_an_export_is_the_same_from_anywhere(bases: BaseStore, tmp_path: Path) -> None:
    base = add(bases, "one")
    exchange.export_base(base, tmp_path / "export")
    whole = (tmp_path / "export").read_bytes()
    assert Export.kept(base) is None
    made, kept = Export.of(base), Export.kept(base)
    assert kept
    for export in (made, kept):
        assert (export.size, export.digest) == (len(whole), blake3(whole).hexdigest())
        for start in range(len(whole) + 1):
            for length in {0, 1, 13, len(whole) - start}:
                with export.read(start, length) as pieces:
                    assert b"".join(pieces) == whole[start : start + length]


def test_an_export_with_chunks_and_holes_is_the_same_from_anywhere(bases: BaseStore, tmp_path: Path) -> None:
    """Chunks of some sizes, each file's last one shorter, and between them nothing."""
    base = add(bases, "one")
    base.path.chmod(0o700)
    sizes = {store.DISK: 7 * CHUNK_BYTES + 999, store.RAM: 3 * CHUNK_BYTES, store.DEVICE_STATE: 70}
    for name, size in sizes.items():
        (base.path / name).unlink()
        with (base.path / name).open("wb") as file:
            file.truncate(size)
            for number in (0, 2, 7):
                file.seek(number * CHUNK_BYTES)
                file.write(os.urandom(max(0, min(50 << number, size - file.tell()))))
    exchange.export_base(base, tmp_path / "export")
    whole = (tmp_path / "export").read_bytes()
    export = Export.of(base)
    assert export.digest == blake3(whole).hexdigest()
    edges = [0, *export.parts[:, 2].tolist()]
    for edge in edges:
        for start in {max(0, edge - 1), edge, min(edge + 5, len(whole))}:
            with export.read(start, len(whole) - start) as pieces:
                assert b"".join(pieces) == whole[start:]
            with export.read(start, 4) as pieces:
                assert b"".join(pieces) == whole[start : start + 4]


def test_an_export_is_packed_anew_when_other_bytes_would_come(
    bases: BaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = add(bases, "one")
    first = Export.of(base)
    exchange.export_base(base, tmp_path / "export")
    renamed = exchange.import_base(bases, tmp_path / "export", "other")
    assert renamed
    assert Export.kept(renamed) is None
    second = Export.of(renamed)
    assert second.digest != first.digest
    index = base.path / "export-index"
    for damage in (b"", b"PK", index.read_bytes()[:-9], b"\0" * 999):
        index.write_bytes(damage)
        assert Export.kept(renamed) is None
        assert Export.of(renamed).digest == second.digest
    monkeypatch.setattr(exchange.zstd, "zstd_version", "9.9.9")
    assert Export.kept(renamed) is None


def test_an_export_of_a_base_that_is_going(bases: BaseStore) -> None:
    base = add(bases, "one")
    export = Export.of(base)
    with export.read(0, export.size) as pieces:
        got = [next(pieces)]
        bases.delete(base, [])
        got += pieces
    assert blake3(b"".join(got)).hexdigest() == export.digest
    with pytest.raises(FileNotFoundError), export.read(0, 1):
        pass
    with pytest.raises(FileNotFoundError):
        Export.of(base)


def test_an_export_that_is_not_as_it_was_ends(bases: BaseStore) -> None:
    base = add(bases, "one")
    export = Export.of(base)
    disk = base.path / store.DISK
    disk.chmod(0o600)
    disk.write_bytes(os.urandom(4096))
    with export.read(0, export.size) as pieces, pytest.raises(CorruptError, match="was changed"):
        list(pieces)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *way, last = path.split("/")
        place: Any = document
        for step in way:
            place = place[step]
        place[last] = value

    return change


DIGEST = "ab" * 32
WRONG = [
    ("name", "x y", CorruptError),
    ("name", "f" * 64, CorruptError),
    ("name", 1, CorruptError),
    ("created", "tomorrow", CorruptError),
    ("created", "9999-99-99T00:00:00Z", CorruptError),
    ("created", None, CorruptError),
    ("description", [], CorruptError),
    ("description/format", 2, CorruptError),
    ("description/news", 1, CorruptError),
    ("description/machine", None, CorruptError),
    ("description/machine/machine_type", "pc-q35-7.2,dump-guest-core=on", CorruptError),
    ("description/machine/machine_type", "pc-i440fx-7.2", CorruptError),
    ("description/machine/cpu_model", "Nehalem,+x", CorruptError),
    ("description/machine/cpu_model", "", CorruptError),
    ("description/machine/cpus", 0, CorruptError),
    ("description/machine/cpus", "1", CorruptError),
    ("description/machine/memory_bytes", 4096, CorruptError),
    ("description/machine/disk_bytes", 8192, CorruptError),
    ("description/machine/disk_bytes", 1 << 46, LimitError),
    ("description/machine/accelerator", "warp", CorruptError),
    ("description/sections", [["ram", 0]], CorruptError),
    ("description/sections", [["ram", 0, "4"]], CorruptError),
    ("description/cmdline", "a\nb", CorruptError),
    ("description/cmdline", "x" * 2049, CorruptError),
    ("description/cmdline", "ü" * 1500, CorruptError),
    ("description/cmdline", 1, CorruptError),
    ("description/ready", "serial:a{99999999999}", CorruptError),
    ("description/ready", "http:80", CorruptError),
    ("description/ready", "never", CorruptError),
    ("description/guest/agent", 1, CorruptError),
    ("description/guest", {"agent": True}, CorruptError),
    ("description/files/kernel", ["1", DIGEST], CorruptError),
    ("description/files/kernel", [1, "x"], CorruptError),
    ("description/files/kernel", [-1, DIGEST], CorruptError),
    ("description/files/kernel", [(512 << 20) + 1, DIGEST], LimitError),
    ("description/files/uefi-vars.fd", [(512 << 20) + 1, DIGEST], LimitError),
    ("description/files/device-state", [DEVICE_BYTES + 1, DIGEST], LimitError),
    ("description/files/disk.raw", [LARGEST_DISK_BYTES + 4096, DIGEST], LimitError),
    ("description/files/../escape", [1, DIGEST], CorruptError),
    ("description/files/ram", [4096, DIGEST], CorruptError),
]


@pytest.mark.parametrize(("path", "value", "error"), WRONG)
def test_all_of_an_export_is_checked_before_it_is_taken(
    path: str, value: Any, error: type[IntegrityError], bases: BaseStore, tmp_path: Path
) -> None:
    if "escape" in path:

        def change(document: dict[str, Any]) -> None:
            document["description"]["files"]["../escape"] = value

    else:
        change = put(path, value)
    export = exported(add(bases, "one"), tmp_path, change)
    other = BaseStore(tmp_path / "elsewhere")
    with pytest.raises(error):
        exchange.import_base(other, export, None)
    assert other.all() == []
    assert other.reap() == []


def test_a_name_of_ones_own_replaces_a_bad_one(bases: BaseStore, tmp_path: Path) -> None:
    export = exported(add(bases, "one"), tmp_path, lambda document: document.update(name="f" * 64))
    other = BaseStore(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="--name"):
        exchange.import_base(other, export, None)
    with pytest.raises(UsageError):
        exchange.import_base(other, export, "f" * 64)
    taken = exchange.import_base(other, export, "mine")
    assert taken
    assert taken.name == "mine"


def test_a_description_is_read_as_it_is_written(bases: BaseStore) -> None:
    description = add(bases, "one").description
    assert Description.from_json(copy.deepcopy(description.to_json())) == description
