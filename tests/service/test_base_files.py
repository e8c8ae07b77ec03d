"""The files of bases on their way out of a site and into it: packed as they are sent, fetched from a URL."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from blake3 import blake3

from cloudlet.client import connect
from cloudlet.control.bases import BaseRequest, import_image
from cloudlet.control.site import Site
from cloudlet.errors import CorruptError
from cloudlet.model import MEBIBYTE
from cloudlet.service.options import Options
from cloudlet.settings import Settings
from cloudlet.store.bases import Base, BaseStore
from cloudlet.store.exchange import export_base, import_base
from tests.cli.damage import flipped
from tests.cli.web import Web
from tests.cli.web import serving as web_serving
from tests.service.conftest import PASSWORD, Caller, Made, options_in, serving
from tests.service.crashes import check_after, dying, play
from tests.service.relay import address, relayed
from tests.service.test_uploads import put_part

SIZE = 16 * MEBIBYTE


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a base that cannot be compressed."""
    folder = tmp_path_factory.mktemp("large")
    make_base(folder, "large-base", os.urandom(SIZE))
    return folder / "cache"


@pytest.fixture(scope="module")
def exported(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base as an exported file."""
    (base,) = BaseStore(large / "bases").all()
    file = tmp_path_factory.mktemp("exported") / "large-base.base"
    export_base(base, file)
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An exported base of some dozens of kilobytes."""
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder, "small-base", os.urandom(60_000).ljust(MEBIBYTE, b"\0"))
    export_base(base, folder / "small.base")
    return (folder / "small.base").read_bytes()


def make_base(folder: Path, name: str, disk: bytes) -> Base:
    """A base of a fake machine with this disk."""
    settings = Settings(folder / "cache", folder / "state", folder / "keys", hypervisor="fake")
    (folder / "raw").write_bytes(disk)
    return import_image(
        Site.open(settings), BaseRequest(name, 4 * MEBIBYTE), folder / "raw", lambda text: None
    )


@pytest.fixture
def made(made: Made, tmp_path: Path) -> Made:
    """What tests have, with a cache folder of their own: no base is in it, and each may come."""
    return replace(made, cache=tmp_path / "cache")


@pytest.fixture
def offered(options: Options, exported: Path) -> Options:
    """Settings of a site that has the large base."""
    assert import_base(BaseStore(options.machine.bases_dir), exported, None)
    return options


def the_base(call: Caller) -> dict[str, object]:
    (base,) = call.get("/v1/bases")["bases"]
    return dict(base)


def nothing_incoming(options: Options) -> None:
    """No bytes of a transfer are left, nor of a base that did not come to be."""
    left = [*(options.blobs_dir / "incoming").glob("*"), *options.machine.bases_dir.glob(".new-*")]
    assert left == []


def test_a_base_is_sent_as_it_would_be_exported(offered: Options, exported: Path) -> None:
    whole = exported.read_bytes()
    with serving(offered) as running:
        reader = running.call.as_("rita")
        path = f"/v1/bases/{the_base(reader)['id']}/file"
        got = reader("GET", path)
        assert (got.status_code, got.content == whole) == (200, True)
        tag = f'"{blake3(whole).hexdigest()}"'
        assert (got.headers["ETag"], got.headers["Accept-Ranges"]) == (tag, "bytes")
        assert got.headers["Content-Length"] == str(len(whole))
        for wanted, part in (
            ("bytes=0-0", whole[:1]),
            ("bytes=5-70000", whole[5:70001]),
            (f"bytes={len(whole) - 13}-", whole[-13:]),
            ("bytes=-2000000", whole[-2000000:]),
            (f"bytes=3000000-{len(whole) * 2}", whole[3000000:]),
        ):
            answer = reader("GET", path, headers={"Range": wanted, "If-Range": tag})
            assert (answer.status_code, answer.content == part) == (206, True), wanted
        assert reader("GET", path, headers={"Range": "bytes=9-", "If-Range": '"other"'}).content == whole
        beyond = reader("GET", path, headers={"Range": f"bytes={len(whole)}-"})
        assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(whole)}")
        assert "octet" not in beyond.headers["Content-Type"]


def test_what_is_not_whole_is_not_sent(call: Caller) -> None:
    base = call.post("/v1/bases", {"base": {"name": "b"}})["base"]
    answer = call("GET", f"/v1/bases/{base['id']}/file")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (409, "cloudlet.base.conflict")


def test_several_at_once_get_the_same(offered: Options, exported: Path) -> None:
    whole = blake3(exported.read_bytes()).digest()
    with serving(offered) as running:
        path, got = f"/v1/bases/{the_base(running.call)['id']}/file", []

        def get() -> None:
            got.append(blake3(running.call.as_("mia")("GET", path).content).digest() == whole)

        threads = [threading.Thread(target=get) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert got == [True] * 6


def test_a_base_may_be_deleted_while_it_is_sent(offered: Options, exported: Path) -> None:
    with serving(offered) as running:
        call, base = running.call, the_base(running.call)
        with call("GET", f"/v1/bases/{base['id']}/file", stream=True) as answer:
            pieces = answer.iter_content(64 << 10)
            got = [next(pieces)]
            call.as_("root").delete(f"/v1/bases/{base['id']}")
            assert list(offered.machine.bases_dir.glob("*/*")) == []
            got += pieces
        assert b"".join(got) == exported.read_bytes()
        assert call("GET", f"/v1/bases/{base['id']}/file").status_code == 404


def test_files_that_are_gone_are_told_and_no_slot_is_lost(offered: Options) -> None:
    with serving(offered) as running:
        call, base = running.call, the_base(running.call)
        assert call("GET", f"/v1/bases/{base['id']}/file", headers={"Range": "bytes=0-0"}).status_code == 206
        folder = offered.machine.bases_dir / str(base["identity"])
        (folder / "ram").unlink()
        for _ in range(3):
            answer = call("GET", f"/v1/bases/{base['id']}/file")
            assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "cloudlet.api.not_found")
            assert "ETag" not in answer.headers
        assert 'cloudlet_slots{kind="transfers"} 0.0' in call("GET", "/metrics").text


def test_a_base_that_was_damaged_is_not_taken_for_whole(offered: Options, tmp_path: Path) -> None:
    with serving(offered) as running, _paula(running.call.url) as site:
        base = site.find_base("large-base")
        site.download_base(base, tmp_path / "whole")
        disk = offered.machine.bases_dir / str(base.identity) / "disk.raw"
        disk.chmod(0o600)
        with disk.open("r+b") as file:
            file.seek(5 * MEBIBYTE + 7)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(flipped(byte, 0, 3))
        with pytest.raises(CorruptError):
            site.download_base(base, tmp_path / "damaged")
        with disk.open("r+b") as file:  # of another length when it is packed
            file.seek(7 * MEBIBYTE)
            file.write(bytes(MEBIBYTE // 2))
        with pytest.raises(requests.RequestException):
            assert running.call("GET", f"/v1/bases/{base.id}/file").content
    assert sorted(tmp_path.glob("*damaged*")) == []


def _paula(url: str):
    return connect(url, user="paula", password=PASSWORD)


def test_a_cut_download_goes_on_also_after_a_restart(
    offered: Options, exported: Path, tmp_path: Path
) -> None:
    size, target = exported.stat().st_size, tmp_path / "got"
    cuts = (("down", 3_000_000), ("down", 2_000_000))
    with (
        serving(offered) as running,
        relayed(address(running.call.url), *cuts) as relay,
        _paula(relay.url) as site,
    ):
        site.download_base(site.find_base("large-base"), target)
        assert relay.cuts == []
        assert relay.carried["down"] < size + MEBIBYTE, "what had arrived was sent again"
    assert target.read_bytes() == exported.read_bytes()
    target.rename(tmp_path / f".got.{blake3(exported.read_bytes()).hexdigest()[:16]}.part")
    with serving(offered) as running, relayed(address(running.call.url)) as relay, _paula(relay.url) as site:
        site.download_base(site.find_base("large-base"), target)
        assert relay.carried["down"] < MEBIBYTE, "all of it was here"
    elsewhere = import_base(BaseStore(tmp_path / "elsewhere"), target, None)
    assert elsewhere
    assert elsewhere.name == "large-base"


def test_bases_have_a_limit_before_their_first_byte(options: Options, exported: Path) -> None:
    size = exported.stat().st_size
    limits = replace(options.limits, base_upload_bytes=2 * size + MEBIBYTE)
    with serving(replace(options, limits=limits)) as running:
        call = running.call
        paths = []
        for number in range(4):
            base = call.post("/v1/bases", {"base": {"name": f"b{number}"}})["base"]
            paths.append(f"/v1/bases/{base['id']}/file")
        refused = put_part(call, paths[0], bytes(3 * size), 0, listen=True)
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert b"cloudlet.base.too_large" in refused
        assert call.get(paths[0].removesuffix("/file"))["base"]["state"] == "queued"
        for path in paths[:2]:
            put_part(call, path, bytes(size), 0)
        _until(lambda: [_state(call, path) for path in paths[:2]] == ["uploading"] * 2)
        third = put_part(call, paths[2], bytes(size), 0, listen=True)
        assert third.startswith(b"HTTP/1.1 413 "), "what is announced is not counted"
        call.delete(paths[0].removesuffix("/file"))
        _until(lambda: not _going(call, paths[1], exported))
        begun = call("PUT", paths[2], data=exported.read_bytes())
        assert begun.status_code == 202, begun.text
        call.done(begun.json())
        assert call("PUT", paths[3], data=exported.read_bytes()).status_code == 413


def _going(call: Caller, path: str, exported: Path) -> bool:
    """Whether somebody still sends it: then it takes no other's bytes."""
    answer = call("PUT", path, data=b"x", headers={"Upload-Offset": "9"})
    return answer.status_code == 409 and "it is being uploaded" in answer.text


def _state(call: Caller, path: str) -> str:
    return str(call.get(path.removesuffix("/file"))["base"]["state"])


def _until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_last_bytes_are_given_once(options: Options, exported: Path) -> None:
    """Uploads and fetches that all want what is left; bases of the site's own do not count."""
    size = exported.stat().st_size
    limits = replace(options.limits, base_upload_bytes=2 * size + size // 2)
    content = exported.read_bytes()
    with web_serving(content) as web, serving(replace(options, limits=limits)) as running:
        call = running.call
        outcomes: list[bool] = []

        def fetch(number: int) -> None:
            mine = call.as_("paula")
            begun = mine.post("/v1/bases", {"base": {"name": f"f{number}", "url": f"{web.url}/whole"}})
            ended = mine.ended(begun["operation"])
            error = (ended["error"] or {}).get("code", "")
            # All are the same base: the second to be whole is told so.
            outcomes.append(error != "cloudlet.operation.too_large")

        def upload(number: int) -> None:
            mine = call.as_("paula")
            base = mine.post("/v1/bases", {"base": {"name": f"u{number}"}})["base"]
            answer = mine("PUT", f"/v1/bases/{base['id']}/file", data=content)
            outcomes.append(answer.status_code == 202)
            assert answer.status_code in (202, 413), answer.text

        web.rate = 4 * size  # so that they are at it at the same time
        threads = [
            threading.Thread(target=act, args=(number,)) for number in range(3) for act in (fetch, upload)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        rows = call.get("/v1/bases")["bases"]
        counted = sum(row["size"] or 0 for row in rows if row["state"] != "rejected")
        assert counted <= limits.base_upload_bytes
        assert len(outcomes) == 6
        assert not all(outcomes)
        assert any(outcomes)
        for operation in call.get("/v1/operations")["operations"]:
            call.ended(operation)
    nothing_incoming(options)


def test_a_base_is_fetched_from_a_url(options: Options, exported: Path) -> None:
    with web_serving(exported.read_bytes()) as web, serving(options) as running:
        call = running.call.as_("paula")
        body = {"base": {"url": f"{web.url}/whole"}}
        answer = call("POST", "/v1/bases", body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 202
        operation = answer.json()["operation"]
        assert answer.headers["Location"].endswith(f"/v1/operations/{operation['id']}")
        assert operation["kind"] == "base.fetch"
        again = call("POST", "/v1/bases", body, headers={"Idempotency-Key": "k"})
        assert (again.status_code, again.json()["operation"]["id"]) == (202, operation["id"])
        done = call.done({"operation": operation})
        assert [step["name"] for step in done["steps"]] == ["fetch", "import"]
        size = exported.stat().st_size
        assert (done["steps"][0]["bytes_done"], done["steps"][0]["bytes_total"]) == (size, size)
        base = call.get(f"/v1/bases/{done['resources']['base']}")["base"]
        assert (base["name"], base["state"], base["user_id"]) == ("large-base", "active", "paula")
        events = [event["kind"] for event in call.events(kind="base")]
        assert events == ["base.queued", "base.active"]
        assert call("GET", f"/v1/bases/{base['id']}/file").content == exported.read_bytes()
        # It is there already: the second is told, and the first stays.
        second = call.ended(
            call.post("/v1/bases", {"base": {"url": f"{web.url}/whole", "name": "mine"}})["operation"]
        )
        assert second["error"]["code"] == "cloudlet.operation.conflict"
        assert call.get(f"/v1/bases/{base['id']}")["base"]["state"] == "active"
    nothing_incoming(options)


def test_what_opens_a_url_is_not_told_to_everybody(options: Options) -> None:
    with web_serving(b"") as web, serving(options) as running:
        call = running.call.as_("paula")
        url = web.url.replace("://", "://me:my-password@") + "/missing?signature=my-signature"
        for wanted in (f"{web.url}/missing?signature=my-signature", url):
            operation = call.post("/v1/bases", {"base": {"url": wanted}})["operation"]
            ended = call.ended(operation)
            assert ended["state"] == "failed"
            base = call.as_("rita").get(f"/v1/bases/{ended['resources']['base']}")
            assert "http://" in base["base"]["error"]["detail"]
            assert "my-" not in json.dumps(base)


def test_a_base_has_the_name_that_is_asked_for(options: Options, exported: Path) -> None:
    with web_serving(exported.read_bytes()) as web, serving(options) as running:
        wanted = {"base": {"url": f"{web.url}/whole", "name": "mine"}}
        done = running.call.done(running.call.post("/v1/bases", wanted))
        assert running.call.get(f"/v1/bases/{done['resources']['base']}")["base"]["name"] == "mine"


@pytest.mark.parametrize("how", ["cut", "cut-no-ranges", "moved", "mending", "no-ranges"])
def test_a_fetch_gets_over_what_servers_do(how: str, options: Options, small: bytes) -> None:
    with web_serving(small) as web, serving(options) as running:
        done = running.call.done(running.call.post("/v1/bases", {"base": {"url": f"{web.url}/{how}"}}))
        assert done["steps"][0]["bytes_done"] == len(small)


@pytest.mark.parametrize(
    ("how", "change", "code"),
    [
        ("missing", bytes, "not_found"),
        ("whole", lambda whole: flipped(whole, len(whole) // 2, 0), "corrupt"),
        ("whole", lambda whole: whole[:-20], "truncated"),
        ("whole", lambda whole: b"PK\3\4" + whole, "corrupt"),
        ("loop", bytes, "failed"),
    ],
    ids=["nothing there", "a flipped bit", "too short", "another file", "a loop"],
)
def test_what_cannot_be_fetched_is_rejected_and_leaves_nothing(
    how: str, change: Callable[[bytes], bytes], code: str, options: Options, exported: Path
) -> None:
    with web_serving(change(exported.read_bytes())) as web, serving(options) as running:
        call = running.call
        ended = call.ended(
            call.post("/v1/bases", {"base": {"url": f"{web.url}/{how}", "name": "b"}})["operation"]
        )
        assert (ended["state"], ended["error"]["code"]) == ("failed", f"cloudlet.operation.{code}")
        base = call.get(f"/v1/bases/{ended['resources']['base']}")["base"]
        assert (base["state"], base["error"]["code"]) == ("rejected", f"cloudlet.base.{code}")
        assert call.events(kind="base.rejected")
        # Its bytes may be sent instead.
        begun = call("PUT", f"/v1/bases/{base['id']}/file", data=exported.read_bytes())
        assert begun.status_code == 202
        call.done(begun.json())
    nothing_incoming(options)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"url": "ftp://x/y"}, 400),
        ({"url": "file:///etc/passwd"}, 400),
        ({"url": "http://x/\n"}, 400),
        ({"url": ""}, 400),
        ({"url": None, "name": "b"}, 400),
        ({"url": "http://x/y", "name": ""}, 400),
        ({"url": "http://x/y", "name": "a b"}, 400),
        ({"url": "http://x/y", "name": "deadbeefdeadbeef"}, 400),
        ({"name": "deadbeefdeadbeef"}, 400),
        ({"url": "http://10.1.2.3/y"}, 422),  # of no network that is allowed
        ({"url": "http://[/y"}, 422),
    ],
    ids=str,
)
def test_what_is_no_base(body: dict[str, object], status: int, call: Caller) -> None:
    answer = call("POST", "/v1/bases", {"base": body})
    assert answer.status_code == status, answer.text
    assert call.get("/v1/bases")["bases"] == []
    assert call.get("/v1/operations")["operations"] == []
    assert call.as_("mia")("POST", "/v1/bases", {"base": {"url": "http://x/y"}}).status_code == 403


def test_a_fetch_is_cancelled_or_its_base_deleted(options: Options, exported: Path) -> None:
    with web_serving(exported.read_bytes()) as web, serving(options) as running:
        call = running.call
        web.hold = MEBIBYTE
        for act in ("cancel", "delete"):
            web.holding.clear()
            web.go.clear()
            operation = call.post("/v1/bases", {"base": {"url": f"{web.url}/whole", "name": "b"}})[
                "operation"
            ]
            path = f"/v1/bases/{operation['resources']['base']}"
            assert web.holding.wait(30)
            _until(lambda path=path: _state(call, path) == "uploading")
            taken = call("PUT", f"{path}/file", data=b"x")
            assert taken.status_code == 409, "two would write one file"
            if act == "cancel":
                call.delete(f"/v1/operations/{operation['id']}")
            else:
                call.delete(path)
            web.go.set()
            assert call.ended(operation)["state"] == "cancelled"
            if act == "cancel":
                assert call.get(path)["base"]["state"] == "rejected"
            else:
                assert call("GET", path).status_code == 404
            nothing_incoming(options)


def test_a_full_disk_is_an_error_and_no_crash(
    options: Options, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "cloudlet-test", room]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        monkeypatch.setattr(Options, "blobs_dir", room)
        with web_serving(exported.read_bytes()) as web, serving(options) as running:
            call = running.call
            ended = call.ended(call.post("/v1/bases", {"base": {"url": f"{web.url}/whole"}})["operation"])
            assert ended["error"]["code"] == "cloudlet.operation.no_capacity"
            assert "no space left" in ended["error"]["detail"]
            assert list((room / "incoming").glob("*")) == []
            assert call("GET", "/healthcheck").status_code == 204
    finally:
        subprocess.run(["umount", room], check=True)


MOMENTS = [(step, state) for step in ("fetch", "import") for state in ("running", "succeeded")]


@pytest.mark.parametrize(("step", "state"), MOMENTS)
def test_killed_at_a_step_of_a_fetch(
    step: str, state: str, options: Options, made: Made, hashed: str, exported: Path, tmp_path: Path
) -> None:
    with web_serving(exported.read_bytes()) as web:
        with dying(tmp_path, made, hashed, "base.fetch", step, state) as (process, call):
            play(lambda call, *_: _fetch(call, web), call, made, options)
            assert process.wait(20) == -9, "it was not killed at this moment"
        assert check_after(options)["states"]["base.fetch"] == "succeeded", "it did not go on"
    with serving(options) as running:
        base = the_base(running.call)
        assert (base["name"], base["state"]) == ("large-base", "active")
    nothing_incoming(options)


def _fetch(call: Caller, web: Web) -> None:
    call.done(call.post("/v1/bases", {"base": {"url": f"{web.url}/whole"}}))


def test_killed_in_the_middle_of_a_fetch(
    options: Options, made: Made, hashed: str, exported: Path, tmp_path: Path
) -> None:
    size = exported.stat().st_size
    with web_serving(exported.read_bytes()) as web:
        web.hold = size // 2
        with dying(tmp_path, made, hashed) as (process, call):
            call.post("/v1/bases", {"base": {"url": f"{web.url}/whole"}})
            assert web.holding.wait(30)
            (part,) = (options.blobs_dir / "incoming").glob("fetch-*")
            _until(lambda: part.stat().st_size > size // 3)
            process.kill()
            process.wait()
        web.go.set()
        web.asked.clear()
        with serving(options_in(tmp_path, made, hashed)) as running:
            (operation,) = running.call.get("/v1/operations")["operations"]
            running.call.done({"operation": operation})
            asked = [int(wanted.partition("=")[2].strip("-")) for wanted in web.ranges() if wanted]
            assert max(asked) > size // 3, "it began anew"
            assert the_base(running.call)["state"] == "active"
    nothing_incoming(options)
