"""The client of a site, against a served one: every verb, cut transfers, refusals, and other ways to it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import openstack
import pytest
from keystoneauth1 import adapter
from openstack.connection import Connection

from cloudlet import errors
from cloudlet.api.faults import FAULTS
from cloudlet.client import CloudletService, Proxy, connect, connect_cloud
from cloudlet.client.connection import session_of
from cloudlet.client.faults import REASONS, LostError, coded
from cloudlet.client.resources import Operation
from cloudlet.service.options import Listening, Options
from tests.service.conftest import PASSWORD, Made, Running, serving
from tests.service.relay import address, large_overlay, relayed


@pytest.fixture(scope="module")
def large(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_overlay(made, tmp_path_factory.mktemp("large"))


def user(running: Running, name: str, url: str = "") -> Proxy:
    return connect(url or running.call.url, user=name, password=PASSWORD)


@pytest.fixture
def paula(running: Running) -> Iterator[Proxy]:
    with user(running, "paula") as site:
        yield site


def test_a_day_with_an_instance(paula: Proxy, made: Made, running: Running) -> None:
    overlay = paula.upload_overlay(paula.create_overlay("hello", public=True), made.overlay)
    app = paula.create_app("hello", overlay, version="1")
    assert paula.update_app(app, summary="says hello").summary == "says hello"
    assert paula.wait_for_operation(paula.prestage_app(app)).state == "succeeded"
    with user(running, "mia") as mia:
        assert mia.find_app("hello").overlay_id == mia.find_overlay("hello").id == overlay.id
        told: list[Operation] = []
        begun = mia.create_instance(app_id=app.id, metadata={"for": "test"}, lease_seconds=600)
        instance = mia.wait_for_instance(begun, told.append)
        assert (instance.state, instance.metadata) == ("active", {"for": "test"})
        assert instance.endpoint == instance.endpoints[0]["url"]
        assert told[-1].ended
        assert mia.find_instance("hello").id == mia.find_instance(instance.id).id == instance.id
        assert mia.renew_instance(instance, 1200).lease_seconds == 1200
        assert mia.update_instance(instance, name="mine").name == "mine"
        assert mia.pause_instance(instance).state == "paused"
        resumed = mia.resume_instance(instance)
        assert resumed.state == "active"
        mia.wait_for_operation(mia.suspend_instance(instance))
        assert mia.get_instance(instance).endpoint is None
        back = mia.resume_instance(instance)
        assert isinstance(back, Operation)
        assert mia.wait_for_instance(back).endpoint
        assert "generation" in mia.console_log(instance)
        assert len(mia.console_log(instance, 10)) == 10
        saved = mia.wait_for_operation(mia.save_instance(instance, "my-hello"))
        assert mia.get_overlay(saved.resources["overlay"]).name == "my-hello"
        assert [row.kind for row in mia.operations(kind="instance.save")] == ["instance.save"]
        assert {row.id for row in mia.instances(state="active")} == {instance.id}
        assert paula.get_cloudlet().used["instances"] == 1
        with user(running, "root") as root:
            assert root.update_cloudlet(state="draining").state == "draining"
            with pytest.raises(errors.DrainingError, match="being emptied"):
                mia.create_instance(app_id=app.id)
            assert root.update_cloudlet(state="up").state == mia.get_cloudlet().state == "up"
        mia.wait_for_operation(mia.delete_instance(instance))
        with pytest.raises(errors.NotFoundError):
            mia.get_instance(instance)
        mia.delete_overlay(mia.find_overlay("my-hello"))
    paula.delete_app(app)
    paula.delete_overlay(overlay)
    assert list(paula.apps()) == []


def test_events_are_read_on_from_a_number(paula: Proxy) -> None:
    for number in range(3):
        paula.create_overlay(f"o{number}")
    seen = list(paula.events(0, kind="overlay"))
    assert [event.detail["name"] for event in seen] == ["o0", "o1", "o2"]
    assert [event.number for event in paula.events(seen[1].number, kind="overlay")] == [seen[2].number]
    assert list(paula.events()) == []
    later = threading.Timer(0.3, paula.create_overlay, ["o3"])
    later.start()
    followed = paula.events(seen[0].number, follow=True, kind="overlay")
    assert [next(followed).detail["name"] for _ in range(3)] == ["o1", "o2", "o3"]
    later.join()


def test_lists_have_pages(paula: Proxy) -> None:
    names = [f"o{number}" for number in range(7)]
    for name in names:
        paula.create_overlay(name)
    assert [row.name for row in paula.overlays(limit=3)] == names
    assert [row.name for row in paula.overlays(max_items=5)] == names[:5]
    assert [row.name for row in paula.overlays(max_items=3000, sort="name:desc")] == names[::-1]


def test_a_name_may_mean_several_or_none(paula: Proxy) -> None:
    both = [paula.create_overlay("same") for _ in range(2)]
    with pytest.raises(errors.ConflictError, match="2 overlays are called same") as raised:
        paula.find_overlay("same")
    assert all(overlay.id in str(raised.value) for overlay in both)
    assert paula.find_overlay(both[1].id).id == both[1].id
    for nothing in ("other", "00000000-0000-0000-0000-000000000000"):
        with pytest.raises(errors.NotFoundError, match="there is no overlay"):
            paula.find_overlay(nothing)
    again = [paula.create_overlay("retried", retry_key="once").id for _ in range(2)]
    assert again[0] == again[1]


def test_a_cut_upload_goes_on(running: Running, large: Path) -> None:
    size = large.stat().st_size
    cuts = (("up", 300_000), ("up", 200_000), ("up", 2_000))
    with relayed(address(running.call.url), *cuts) as relay, user(running, "paula", relay.url) as site:
        shown: list[tuple[int, int]] = []
        record = site.create_overlay("large")
        sent = site.upload_overlay(record, large, lambda done, total: shown.append((done, total)))
        assert (sent.state, sent.size) == ("active", size)
        assert relay.cuts == []
        assert relay.carried["up"] < size + 100_000, "what had arrived was sent again"
        assert shown[-1] == (size, size)
        assert site.upload_overlay(record, large).state == "active"


def test_the_answer_to_the_last_byte_may_be_lost(running: Running, large: Path) -> None:
    with relayed(address(running.call.url)) as relay, user(running, "paula", relay.url) as site:

        def cut_the_answer(done: int, total: int) -> None:
            if done == total and not relay.cut:
                relay.cuts.append(("down", 0))

        sent = site.upload_overlay(site.create_overlay("large"), large, cut_the_answer)
        assert sent.state == "active"
        assert relay.cut == 1


def test_a_cut_download_goes_on(running: Running, large: Path, tmp_path: Path) -> None:
    size, target = large.stat().st_size, tmp_path / "got"
    with user(running, "paula") as site:
        record = site.upload_overlay(site.create_overlay("large"), large)
    cuts = (("down", 300_000), ("down", 200_000))
    with relayed(address(running.call.url), *cuts) as relay, user(running, "paula", relay.url) as site:
        site.download_overlay(record, target)
        assert relay.cuts == []
        assert relay.carried["down"] < size + 200_000, "what had arrived was sent again"
    assert target.read_bytes() == large.read_bytes()
    assert list(tmp_path.glob(".got*")) == []


def test_a_download_that_is_not_what_it_should_be_leaves_nothing(
    running: Running, large: Path, tmp_path: Path
) -> None:
    with user(running, "paula") as site:
        record = site.upload_overlay(site.create_overlay("large"), large)
        blob = running.site.blobs.path(record.digest or "")
        assert blob
        blob.chmod(0o600)
        with blob.open("r+b") as file:
            file.seek(500_000)
            file.write(bytes(100))
        with pytest.raises(errors.CorruptError):
            site.download_overlay(record, tmp_path / "got")
        assert list(tmp_path.glob("*got*")) == []


def test_what_a_site_refuses_is_an_error_of_ours(paula: Proxy, made: Made, running: Running) -> None:
    with (
        connect(running.call.url, user="paula", password="wrong") as stranger,
        pytest.raises(errors.RefusedError, match="password is wrong") as raised,
    ):
        list(stranger.instances())
    assert raised.value.exit_code == errors.ExitCode.REFUSED
    with pytest.raises(errors.UsageError, match="name"):
        paula.create_overlay("")
    with pytest.raises(errors.ConflictError, match="queued"):
        paula.create_instance(overlay_id=paula.create_overlay("empty").id)
    with user(running, "mia") as mia, pytest.raises(errors.RefusedError):
        mia.create_app("a", paula.find_overlay("empty"))
    rejected = made.overlay.parent / "rejected"
    rejected.write_bytes(made.overlay.read_bytes()[:-1] + b"!")
    with pytest.raises(errors.IntegrityError):
        paula.upload_overlay(paula.find_overlay("empty"), rejected)
    with pytest.raises(errors.ConflictError, match="rejected"):
        paula.download_overlay(paula.find_overlay("empty"), made.overlay)
    limits = replace(running.site.options.limits, instances=0)
    running.site.reload(replace(running.site.options, limits=limits))
    overlay = paula.upload_overlay(paula.create_overlay("hello"), made.overlay)
    with pytest.raises(errors.CapacityError, match="instances"):
        paula.create_instance(overlay_id=overlay.id)


def test_a_failed_operation_raises_why(paula: Proxy, made: Made, tmp_path: Path) -> None:
    (tmp_path / "no.base").write_bytes(b"this is no base")
    begun = paula.upload_base(paula.create_base("no-base"), tmp_path / "no.base")
    with pytest.raises(errors.IntegrityError):
        paula.wait_for_operation(begun)
    with pytest.raises(errors.ConflictError, match="failed"):
        paula.cancel_operation(begun)
    assert paula.find_base("fake-base").identity == made.base_id
    assert {base.state for base in paula.bases()} == {"active", "rejected"}


def test_every_kind_of_error_is_the_same_at_both_ends() -> None:
    for kind, fault in FAULTS.items():
        assert REASONS[fault.reason].exit_code == kind.exit_code, fault
    assert isinstance(coded("cloudlet.x.of_tomorrow", "?", errors.ConflictError), errors.ConflictError)


def test_where_nobody_is(tmp_path: Path) -> None:
    with pytest.raises(LostError, match=r"no cloudlet answers at unix:.*cloudlet serve"):
        connect(f"unix:{tmp_path}/api.sock")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(LostError, match=url):
        connect(url)
    with pytest.raises(errors.UsageError, match="unix:PATH"):
        connect("localhost:8790")


def test_a_unix_socket_is_its_owners(options: Options, made: Made, tmp_path: Path) -> None:
    place = tmp_path / "api.sock"
    private = replace(options, listening=Listening(path=place), auth_strategy="noauth")
    with serving(private), connect(f"unix:{place}") as site:
        assert site.get_cloudlet().hypervisor == "fake"
        overlay = site.upload_overlay(site.create_overlay("hello"), made.overlay)
        site.download_overlay(overlay, tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == made.overlay.read_bytes()
        assert [row.name for row in site.overlays(limit=1)] == ["hello"], "links lead through the socket"
        with closing(Connection(session=session_of(f"unix:{place}"))) as connection:
            connection.add_service(CloudletService())
            assert list(connection.cloudlet.instances()) == []
        # As a program does it that knows of no Unix sockets.
        with (
            relayed(str(place)) as relay,
            closing(openstack.connect(auth_type="none", auth={"endpoint": relay.url})) as connection,
        ):
            connection.add_service(CloudletService())
            assert [row.name for row in connection.cloudlet.overlays()] == ["hello"]


def test_openstack_finds_the_service_by_itself(
    running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auth = {"endpoint": running.call.url, "username": "mia", "password": PASSWORD}
    with closing(openstack.connect(auth_type="http_basic", auth=auth)) as connection:
        connection.add_service(CloudletService())
        assert list(connection.cloudlet.instances()) == []
        assert connection.cloudlet.get_cloudlet().state == "up"
    session = session_of(running.call.url, "mia", PASSWORD)
    plain = adapter.Adapter(session, service_type="cloudlet", min_version="1", max_version="1.latest")
    data = plain.get_endpoint_data()
    assert data
    assert (data.api_version, data.max_microversion) == ((1, 0), (1, 0))
    answer = plain.get("/instances", endpoint_override=data.url, microversion="1.0")
    assert answer.json() == {"instances": [], "links": []}
    assert answer.headers["OpenStack-API-Version"] == "cloudlet 1.0"
    session.close()
    (tmp_path / "clouds.yaml").write_text(
        f"clouds: {{here: {{auth_type: http_basic, auth: {{endpoint: '{running.call.url}', "
        f"username: mia, password: '{PASSWORD}'}}}}}}"
    )
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    with connect_cloud("here") as site:
        assert site.get_cloudlet().name == running.site.name
    with pytest.raises(errors.UsageError, match=r"clouds\.yaml"):
        connect_cloud("there")


def test_waiting_has_an_end(options: Options, made: Made) -> None:
    gate = threading.Event()

    def observe(kind: str, step: str, _state: str) -> None:
        if (kind, step) == ("instance.create", "synthesise"):
            gate.wait(30)

    with serving(options, observe) as running, user(running, "root") as site:
        overlay = site.upload_overlay(site.create_overlay("hello"), made.overlay)
        begun = site.create_instance(overlay_id=overlay.id)
        began = time.monotonic()
        with pytest.raises(errors.FailedError, match="is still running"):
            site.wait_for_operation(begun, timeout=0.5)
        assert 0.4 < time.monotonic() - began < 10
        assert site.cancel_operation(begun).cancelled
        gate.set()
        with pytest.raises(errors.FailedError, match="was cancelled"):
            site.wait_for_operation(begun)
        site.wait_for_operation(site.delete_instance(begun.resources["instance"]))
