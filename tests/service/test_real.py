"""A site on real QEMU guests: what only they can show."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudlet.hypervisor.records import records
from cloudlet.service.options import Listening, Options, read_options
from cloudlet.settings import Settings, read_files
from tests.addresses import host_addresses
from tests.cli.conftest import EARLY_RECIPE, Hello, publish
from tests.conftest import KEPT
from tests.service.conftest import Caller, Running, nothing_runs, serving
from tests.service.test_everyday import count

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def early(quick_base_id: str, tmp_path_factory: pytest.TempPathFactory) -> Hello:
    """A signed overlay that starts early, on the quick guest."""
    return publish(quick_base_id, tmp_path_factory.mktemp("early"), EARLY_RECIPE)


@pytest.fixture
def options(options: Options, early: Hello, tmp_path: Path) -> Options:
    """Settings of a site with QEMU, and the bases of all tests."""
    machine = Settings(KEPT / "cache", tmp_path / "state", early.keys, accelerator="tcg")
    return replace(
        options, machine=machine, database_url=read_options(read_files("/dev/null"), machine).database_url
    )


@pytest.fixture
def running(options: Options) -> Iterator[Running]:
    with serving(options) as running:
        yield running
        for instance in running.call.get("/v1/instances")["instances"]:
            running.call.done(running.call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)


def cold(instance: dict[str, object]) -> int:
    """How many bytes of the file there are of which the guest had no page when it answered."""
    endpoint = instance["endpoints"][0]["url"]  # type: ignore[index]
    with urllib.request.urlopen(f"{endpoint}/cold", timeout=60) as answer:
        return len(answer.read())


def test_a_day_at_a_site(options: Options, early: Hello) -> None:
    with serving(options) as running:
        call = running.call
        app = call.publish(early.path, name="early")
        instance = call.start(app)
        assert cold(instance) == 4 << 20
        before = count(instance)
        path = f"/v1/instances/{instance['id']}"
        assert call.post(f"{path}/pause")["instance"]["state"] == "paused"
        assert call.post(f"{path}/resume")["instance"]["state"] == "active"
        saved = call.done(call.post(f"{path}/overlay", {"overlay": {"name": "mine"}}))["resources"]["overlay"]
        ((_, record),) = records(options.machine.instances_dir)
    # Nobody serves: the machine goes on.
    after = count(instance)
    assert after == before + 1
    assert record.machine
    assert record.machine.alive()
    with serving(options) as running:
        call = running.call
        again = call.instance(instance["id"])
        assert (again["state"], again["endpoints"]) == ("active", instance["endpoints"])
        call.done(call.post(f"{path}/suspend"))
        assert not record.machine.alive()
        call.done(call.post(f"{path}/resume"))
        assert count(call.instance(instance["id"])) == after + 1
        started = call.done(call.post("/v1/instances", {"instance": {"overlay_id": saved}}))
        mine = call.instance(started["resources"]["instance"])
        assert count(mine) == before + 1
        assert cold(mine) == 4 << 20
        for one in (mine, again):
            call.done(call.delete(f"/v1/instances/{one['id']}"))
    nothing_runs(options.machine)


def test_several_at_once_and_none_reaches_the_site(running: Running, early: Hello) -> None:
    call = running.call
    app = call.publish(early.path, name="early")
    made: list[dict[str, object]] = []

    def start() -> None:
        made.append(call.as_("mia").start(app))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [instance["state"] for instance in made] == ["active"] * 3
    assert len({instance["endpoints"][0]["port"] for instance in made}) == 3  # type: ignore[index]
    port = call.url.rpartition(":")[2]
    for host in ("10.0.2.2", "127.0.0.1"):
        assert _asks(running, f"wget -q -T 3 -O - http://{host}:{port}/v1") == "", "a guest reaches the site"


def _asks(running: Running, command: str) -> str:
    """What a guest gets when it runs a command; whether that ends well does not matter."""
    instance, *_ = running.site.machine.hypervisor.instances()
    assert instance.agent
    _, output = instance.agent.run(["/bin/sh", "-c", f"{command} 2>/dev/null"], timeout=30.0)
    return output.decode()


def test_a_guest_gets_no_answer_from_the_site(options: Options, early: Hello) -> None:
    """Where the API listens on all addresses, and everybody else is answered."""
    with serving(replace(options, listening=Listening(host="0.0.0.0", port=0))) as running:
        port = running.call.url.rpartition(":")[2]
        call = Caller(f"http://127.0.0.1:{port}")
        instance = call.start(call.publish(early.path, name="early"))
        places = ["10.0.2.2", "10.0.2.3", "127.0.0.1", "169.254.169.254", *host_addresses()]
        for place in host_addresses():
            with urllib.request.urlopen(f"http://{place}:{port}/", timeout=10) as answer:
                assert answer.status == 200
        get = "printf 'GET / HTTP/1.0\\r\\n\\r\\n'"
        asks = "".join(
            f"{get} | nc -w 2 {place} {port} 2>/dev/null | grep -q versions && echo {place}\n"
            for place in places
        )
        endpoint = instance["endpoints"][0]["url"]
        script = f"nc -w 2 127.0.0.1 8080 < /dev/null && echo itself\n{asks}echo tried\n"
        with urllib.request.urlopen(f"{endpoint}/cgi-bin/run", script.encode(), timeout=60) as said:
            assert said.read().split() == [b"itself", b"tried"]
        call.done(call.delete(f"/v1/instances/{instance['id']}"))
    nothing_runs(options.machine)
