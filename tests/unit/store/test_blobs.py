from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from blake3 import blake3

from cloudlet.errors import CorruptError, NotFoundError
from cloudlet.store.blobs import BlobStore, Damage
from cloudlet.store.database import Database


@pytest.fixture
def blobs(database: Database, tmp_path: Path) -> BlobStore:
    return BlobStore(database, tmp_path / "blobs", limit=1000)


def take(blobs: BlobStore, content: bytes, holder: str = "overlay:a", *, kept: bool = False) -> str:
    digest = blake3(content).hexdigest()
    file = blobs.staging(f"{digest[:8]}-{holder[-1]}")
    file.write_bytes(content)
    blobs.adopt(file, digest, holder, kept=kept)
    return digest


def test_a_blob_is_there_as_long_as_somebody_holds_it(blobs: BlobStore) -> None:
    digest = take(blobs, b"content", "overlay:a", kept=True)
    assert take(blobs, b"content", "overlay:b") == digest
    with blobs.in_use(digest) as path:
        assert path.read_bytes() == b"content"
    blobs.release("overlay:a")
    blobs.release("overlay:a")
    assert blobs.path(digest)
    blobs.release("overlay:b")
    assert blobs.path(digest) is None
    assert blobs.bytes() == 0
    with pytest.raises(NotFoundError), blobs.in_use(digest):
        pass


def test_what_is_cached_makes_room_and_what_is_kept_or_in_use_stays(blobs: BlobStore) -> None:
    kept = take(blobs, os.urandom(900), "overlay:k", kept=True)
    first, second, third = (take(blobs, os.urandom(300), f"overlay:{name}") for name in "abc")
    with blobs.in_use(first):
        fourth = take(blobs, os.urandom(300), "overlay:d")
        assert [blobs.path(digest) is not None for digest in (kept, first, second, third, fourth)] == [
            True, True, False, True, True,
        ]  # fmt: skip
        blobs.limit = 0
        blobs.make_room()
        assert blobs.path(first)
    assert blobs.path(first) is None or blobs.make_room() == [first]
    assert blobs.path(kept)
    assert blobs.verify() == []


def test_what_was_used_last_goes_last(blobs: BlobStore) -> None:
    first, second, third = (take(blobs, os.urandom(300), f"overlay:{name}") for name in "abc")
    with blobs.in_use(first):
        pass
    take(blobs, os.urandom(300), "overlay:d")
    assert blobs.path(first)
    assert blobs.path(second) is None
    assert blobs.path(third)


def test_what_is_wrong_is_found(blobs: BlobStore) -> None:
    good, damaged, missing = (take(blobs, os.urandom(200), f"overlay:{name}") for name in "abc")
    path = blobs.path(damaged)
    assert path
    path.chmod(0o600)
    path.write_bytes(bytes(200))
    lost = blobs.path(missing)
    assert lost
    lost.unlink()
    orphan = blobs.folder / "aa" / ("aa" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"")
    found = set(blobs.verify())
    assert found == {
        Damage(damaged, "damaged"), Damage(missing, "missing"), Damage("aa" * 32, "not in the database"),
    }  # fmt: skip
    assert blobs.reap() == ["aa" * 32]
    assert not orphan.exists()
    assert blobs.path(good)


DIES = """
import os, sys
from pathlib import Path
from cloudlet.store.blobs import BlobStore
from cloudlet.store.database import Database
url, folder, digest = sys.argv[1:]
use = BlobStore(Database(url), Path(folder), 1000).in_use(digest)
use.__enter__()
os._exit(0)
"""


def test_users_of_a_process_that_died_are_forgotten(blobs: BlobStore, database: Database) -> None:
    digest = take(blobs, b"content")
    command = [sys.executable, "-W", "ignore", "-c", DIES, database.url, str(blobs.folder), digest]
    subprocess.run(command, check=True)
    blobs.limit = 0
    assert blobs.make_room() == [], "it may live"
    with blobs.in_use(digest):
        blobs.reap()
        assert blobs.make_room() == [], "we do"
    blobs.limit = 1000
    take(blobs, b"content")
    blobs.limit = 0
    assert blobs.make_room() == [digest]


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "a" * 63])
def test_what_is_no_digest_is_no_path(digest: str, blobs: BlobStore) -> None:
    with pytest.raises(CorruptError):
        blobs.path(digest)


def test_many_who_take_and_release_the_same(blobs: BlobStore) -> None:
    problems: list[Exception] = []

    def work(name: str) -> None:
        try:
            for _ in range(10):
                digest = take(blobs, b"the same", f"overlay:{name}", kept=True)
                with blobs.in_use(digest) as path:
                    assert path.read_bytes() == b"the same"
                blobs.release(f"overlay:{name}")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert blobs.verify() == []
    assert blobs.bytes() == 0
