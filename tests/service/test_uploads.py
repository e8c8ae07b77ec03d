"""Bytes on their way into a site and out of it: cut, resumed, forged, too many, several at once."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from blake3 import blake3
from requests.auth import _basic_auth_str

from cloudlet.service.options import Options
from cloudlet.transfer.networks import Networks
from tests.cli.damage import KINDS, flipped, signer
from tests.cli.web import serving as web_serving
from tests.service.conftest import PASSWORD, Caller, Made, Running, nothing_runs, serving

ONLY_SEEN_AT_THE_START = {"base missing, signed", "other memory, signed", "other devices, signed"}
"""Well-made overlays, of another base or machine."""


def queued(call: Caller, **more: object) -> str:
    """The path of a new overlay's file."""
    overlay = call.post("/v1/overlays", {"overlay": {"name": "o", **more}})["overlay"]
    return f"/v1/overlays/{overlay['id']}/file"


def state(call: Caller, path: str) -> dict[str, object]:
    return dict(call.get(path.removesuffix("/file"))["overlay"])


def put_part(call: Caller, path: str, content: bytes, sent: int, *, listen: bool = False) -> bytes:
    """Send the head of an upload and some bytes of it, and hang up; or listen first what the site says."""
    parts = urlsplit(call.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\nUpload-Offset: 0\r\n"
            f"Authorization: {_basic_auth_str(call.name or '', PASSWORD)}\r\n\r\n"
        )
        connection.sendall(head.encode() + content[:sent])
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")) if listen else b""


def test_an_upload_that_was_cut_goes_on(call: Caller, made: Made) -> None:
    whole = made.overlay.read_bytes()
    path = queued(call)
    assert call("HEAD", path).headers["Upload-Offset"] == "0"
    put_part(call, path, whole, 500)
    for _ in range(200):
        if (here := int(call("HEAD", path).headers["Upload-Offset"])) == 500:
            break
    assert here == 500
    assert state(call, path)["state"] == "uploading"
    wrong = call("PUT", path, data=whole[400:], headers={"Upload-Offset": "400"})
    assert wrong.status_code == 409
    assert "500" in wrong.json()["errors"][0]["detail"]
    done = call("PUT", path, data=whole[500:], headers={"Upload-Offset": "500"})
    assert done.status_code == 200, done.text
    overlay = done.json()["overlay"]
    assert (overlay["state"], overlay["size"]) == ("active", len(whole))
    assert overlay["digest"] == blake3(whole).hexdigest()
    again = call("PUT", path, data=whole)
    assert again.status_code == 409


def test_a_download_has_ranges(call: Caller, made: Made) -> None:
    whole = made.overlay.read_bytes()
    path = queued(call)
    assert call("GET", path).status_code == 409
    assert call("PUT", path, data=whole).status_code == 200
    head = call("HEAD", path)
    assert head.headers["Content-Length"] == str(len(whole))
    tag = head.headers["ETag"]
    for wanted, part in (
        ("bytes=0-9", whole[:10]),
        ("bytes=100-", whole[100:]),
        ("bytes=-7", whole[-7:]),
        (f"bytes=5-{len(whole) * 2}", whole[5:]),
    ):
        answer = call("GET", path, headers={"Range": wanted, "If-Range": tag})
        assert (answer.status_code, answer.content) == (206, part), wanted
        assert answer.headers["Content-Length"] == str(len(part))
    assert call("GET", path, headers={"Range": "bytes=0-9", "If-Range": '"other"'}).content == whole
    assert call("GET", path, headers={"Range": "bytes=0-1,4-5"}).content == whole
    for wanted in (f"bytes={len(whole)}-", "bytes=-0", "bytes=9-3"):
        answer = call("GET", path, headers={"Range": wanted})
        assert answer.status_code == 416, wanted
        assert answer.headers["Content-Range"] == f"bytes */{len(whole)}"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda whole: flipped(whole, len(whole) - 9, 0), "corrupt"),
        (lambda whole: whole[:-1], "truncated"),
        (lambda whole: whole + b"\0", "corrupt"),
        (lambda whole: b"PK\3\4" + bytes(400), "corrupt"),
        (lambda whole: whole[:20], "truncated"),
    ],
    ids=["a flipped bit", "one byte short", "goes on", "another file", "hardly anything"],
)
def test_what_is_not_whole_is_rejected_and_kept_nowhere(
    damage, code: str, call: Caller, made: Made, running: Running
) -> None:
    path = queued(call)
    answer = call("PUT", path, data=damage(made.overlay.read_bytes()))
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (422, f"cloudlet.overlay.{code}")
    rejected = state(call, path)
    assert rejected["state"] == "rejected"
    assert rejected["error"]["code"] == f"cloudlet.overlay.{code}"  # type: ignore[index]
    assert [
        file for file in running.site.blobs.folder.rglob("*") if file.is_file() and file.name != ".lock"
    ] == []
    whole = call("PUT", path, data=made.overlay.read_bytes())
    assert whole.status_code == 200, "it cannot be tried again"


def test_an_overlay_that_nobody_trusted_signed(options: Options, made: Made, tmp_path) -> None:
    machine = replace(options.machine, keys_dir=tmp_path / "other-keys")
    with serving(replace(options, machine=machine)) as running:
        path = queued(running.call)
        answer = running.call("PUT", path, data=made.overlay.read_bytes())
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["code"] == "cloudlet.overlay.signature"


def test_every_kind_of_damage_and_forgery_is_refused(options: Options, made: Made) -> None:
    """Bytes that are cut, reordered, forged, grow without end: nothing of them is kept, others are served."""
    whole = made.overlay.read_bytes()
    with serving(options) as running:
        call = running.call.as_("mia")
        for kind in KINDS:
            path = queued(call)
            refused = call("PUT", path, data=kind.make(whole, signer(options.machine)))
            if kind.name in ONLY_SEEN_AT_THE_START:
                assert refused.status_code == 200, kind.name
                overlay_id = state(call, path)["id"]
                refused = call("POST", "/v1/instances", {"instance": {"overlay_id": overlay_id}})
                assert refused.status_code in (404, 422), (kind.name, refused.text)
            elif kind.name == "empty":
                assert refused.status_code == 400, refused.text
            else:
                assert refused.status_code == 422, (kind.name, refused.text)
                assert state(call, path)["state"] == "rejected", kind.name
        assert list(options.blobs_dir.glob("incoming/*")) == []
        assert call.get("/v1/instances")["instances"] == []


def test_bytes_that_come_and_go_are_counted(call: Caller, made: Made) -> None:
    whole = made.overlay.read_bytes()
    path = queued(call)
    assert call("PUT", path, data=whole).status_code == 200
    call("GET", path, headers={"Range": "bytes=0-99"})
    figures = call("GET", "/metrics").text
    assert f'cloudlet_transferred_bytes_total{{direction="received"}} {len(whole)}.0\n' in figures
    assert 'cloudlet_transferred_bytes_total{direction="sent"} 100.0\n' in figures


def test_several_uploads_at_once(call: Caller, made: Made) -> None:
    whole = made.overlay.read_bytes()
    paths = [queued(call) for _ in range(8)]
    answers: list[int] = []

    def put(path: str) -> None:
        answers.append(call.as_("root")("PUT", path, data=whole).status_code)

    threads = [threading.Thread(target=put, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 8
    for path in paths[:-1]:
        call.delete(path.removesuffix("/file"))
    assert call("GET", paths[-1]).content == whole, "the blob went with the first that held it"


def test_the_last_megabyte_is_given_once(options: Options, made: Made) -> None:
    size = made.overlay.stat().st_size
    limits = replace(options.limits, project_upload_bytes=2 * size + size // 2)
    with serving(replace(options, limits=limits)) as running:
        paths = [queued(running.call) for _ in range(8)]
        answers = []

        def put(path: str) -> None:
            answers.append(running.call.as_("root")("PUT", path, data=made.overlay.read_bytes()).status_code)

        threads = [threading.Thread(target=put, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(answers) == [200] * 2 + [413] * 6


def test_more_than_the_project_may_is_refused_before_the_first_byte(options: Options) -> None:
    limits = replace(options.limits, project_upload_bytes=1000)
    with serving(replace(options, limits=limits)) as running:
        path = queued(running.call)
        answer = put_part(running.call, path, bytes(1 << 20), 0, listen=True)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"may upload" in answer
        assert running.call("HEAD", path).headers["Upload-Offset"] == "0"


def test_a_saved_machine_counts_like_an_upload(options: Options, made: Made) -> None:
    size = made.overlay.stat().st_size
    limits = replace(options.limits, project_upload_bytes=size + 100)
    with serving(replace(options, limits=limits)) as running:
        call = running.call
        instance = call.start(call.publish(made.overlay))
        saved = call.post(f"/v1/instances/{instance['id']}/overlay", {"overlay": {"name": "mine"}})
        ended = call.ended(saved["operation"])
        assert ended["state"] == "failed"
        assert "may upload 100 B more" in ended["error"]["detail"]
        assert state(call, f"/v1/overlays/{ended['resources']['overlay']}/file")["state"] == "rejected"
        assert call.instance(instance["id"])["state"] == "active"
        assert list(options.blobs_dir.glob("incoming/*")) == []
        call.done(call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)


def test_an_upload_says_how_long_it_is(call: Caller) -> None:
    path = queued(call)

    def pieces():
        yield b"x"

    answer = call("PUT", path, data=pieces())
    assert answer.status_code == 400
    assert "Content-Length" in answer.json()["errors"][0]["detail"]
    bad = call("PUT", path, data=b"x", headers={"Upload-Offset": "-1"})
    assert bad.status_code == 400


def test_an_overlay_at_a_url_is_fetched_when_it_is_needed(options: Options, made: Made) -> None:
    with web_serving(made.overlay.read_bytes()) as web, serving(options) as running:
        call = running.call
        created = call.post("/v1/overlays", {"overlay": {"name": "far", "url": f"{web.url}/whole"}})[
            "overlay"
        ]
        app = {"name": "far", "version": "1", "components": [{"overlay_id": created["id"]}]}
        row = call.post("/v1/apps", {"app": app})["app"]
        instance = call.start(row)
        assert instance["state"] == "active"
        done = call.done(call.post(f"/v1/apps/{row['id']}/prestage"))
        assert done["steps"][0]["bytes_done"] == len(web.content)
        here = call.get(f"/v1/overlays/{created['id']}")["overlay"]
        assert (here["state"], here["digest"]) == ("active", blake3(web.content).hexdigest())
        web.leave()
        second = call.start(row)
        assert second["state"] == "active", "it was not started from here"
        for one in (instance, second):
            call.done(call.delete(f"/v1/instances/{one['id']}"))
        direct = call("POST", "/v1/instances", {"instance": {"url": f"{web.url}/gone"}})
        assert direct.status_code == 422
    nothing_runs(options.machine)


def test_a_url_leads_to_public_addresses_only(options: Options, made: Made) -> None:
    closed = replace(
        options, machine=replace(options.machine, fetch_networks=()), fetch_networks=Networks(())
    )
    with web_serving(made.overlay.read_bytes()) as web:
        url = f"{web.url}/whole"
        with serving(options) as running:
            running.call.post("/v1/overlays", {"overlay": {"name": "far", "url": url}})
        web.asked.clear()
        with serving(closed) as running:
            call = running.call
            for body in (
                ("overlays", {"overlay": {"name": "o", "url": url}}),
                ("instances", {"instance": {"url": url}}),
            ):
                refused = call("POST", f"/v1/{body[0]}", body[1])
                assert refused.status_code == 422, refused.text
                assert "which is not a public address" in refused.json()["errors"][0]["detail"]
            (overlay,) = call.get("/v1/overlays")["overlays"]
            refused = call("POST", "/v1/instances", {"instance": {"overlay_id": overlay["id"]}})
            assert refused.status_code == 422
            app = {"name": "far", "version": "1", "components": [{"overlay_id": overlay["id"]}]}
            row = call.post("/v1/apps", {"app": app})["app"]
            ended = call.ended(call.post(f"/v1/apps/{row['id']}/prestage")["operation"])
            assert (ended["state"], ended["error"]["code"]) == ("failed", "cloudlet.operation.impossible")
            # As when the name leads elsewhere after the site has looked at the overlay's head.
            running.site.options = replace(closed, fetch_networks=options.fetch_networks)
            asked = call.post("/v1/instances", {"instance": {"overlay_id": overlay["id"]}})
            read = len(web.asked)
            ended = call.ended(asked["operation"])
            assert (ended["state"], ended["error"]["code"]) == ("failed", "cloudlet.operation.impossible")
            assert len(web.asked) == read, "its keeper has asked"
            call.done(call.delete(f"/v1/instances/{asked['operation']['resources']['instance']}"))
    nothing_runs(options.machine)
