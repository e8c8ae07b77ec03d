"""The commands that talk to a site, as users type them, against a served one; and ``openstack cloudlet``."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cloudlet.cli.app import main
from cloudlet.service.options import Listening, Options
from cloudlet.store.bases import BaseStore
from cloudlet.store.exchange import export_base
from tests.cli.web import serving as web_serving
from tests.conftest import Finished
from tests.service.conftest import PASSWORD, Caller, Made, Running, serving
from tests.service.relay import address, large_overlay, relayed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def as_it_was() -> Iterator[None]:
    """What a program may change for itself is put back: signals, logs."""
    root, theirs, served = map(logging.getLogger, ("", "keystoneauth", "cloudlet.api"))
    served.propagate = False  # the site is served in this process, too
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    logs = root.handlers[:], root.level
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers[:], root.level = logs
        theirs.handlers.clear()
        theirs.propagate = served.propagate = True


def run(*arguments: str | Path) -> Finished:
    """Run a command line in this process, which saves the seconds that loading takes."""
    out, err = io.StringIO(), io.StringIO()
    with as_it_was(), redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = int(error.code or 0)
    return Finished(status, out.getvalue(), err.getvalue())


@dataclass
class Users:
    """Command lines of a site's users."""

    monkeypatch: pytest.MonkeyPatch
    url: str

    def __call__(self, user: str, *arguments: str | Path) -> Finished:
        self.monkeypatch.setenv("CLOUDLET_SITE", self.url)
        self.monkeypatch.setenv("CLOUDLET_USER", user)
        self.monkeypatch.setenv("CLOUDLET_PASSWORD", PASSWORD)
        return run(*arguments)

    def json(self, user: str, *arguments: str | Path) -> Any:
        done = self(user, *arguments, "-f", "json")
        assert done.status == 0, done.err
        return json.loads(done.out)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("OS_", "CLOUDLET_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OS_DEFAULT__STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch, call: Caller) -> Users:
    return Users(monkeypatch, call.url)


def ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        return bytes(answer.read())


def test_a_publisher_and_a_user(users: Users, made: Made, tmp_path: Path) -> None:
    published = users("paula", "app", "publish", made.overlay)
    assert published.status == 0, published.err
    assert "app hello 1 is published\n" in published.err
    again = users("paula", "app", "publish", made.overlay, "-f", "json")
    assert "these bytes are there already" in again.err
    assert "is published already" in again.err
    app = json.loads(again.out)
    assert (app["name"], app["version"], app["public"]) == ("hello", "1", True)
    assert users("paula", "app", "publish", made.overlay, "--name", "other", "--private").status == 0
    assert {row["name"] for row in users.json("paula", "app", "list")} == {"hello", "other"}
    assert [row["name"] for row in users.json("mia", "app", "list")] == ["hello"]
    assert len(users.json("paula", "site", "overlay", "list")) == 1
    assert users.json("paula", "app", "set", "hello", "--summary", "says it", "--restart")["restart"] is True
    assert users.json("mia", "app", "show", app["id"])["summary"] == "says it"
    staged = users("paula", "app", "prestage", "hello")
    assert (staged.status, staged.err) == (0, "all that hello 1 needs is at the site\n")

    wanted = ("hello", "--name", "mine", "--property", "for=test", "--port", "0:8080", "--lease", "600")
    instance = users.json("mia", "instance", "create", *wanted)
    assert (instance["name"], instance["state"], instance["lease_seconds"]) == ("mine", "active", 600)
    assert instance["properties"] == {"for": "test"}
    assert ask(instance["endpoint"]) == b"hello\n"
    assert instance["endpoints"][0]["guest_port"] == 8080
    assert users("mia", "instance", "show", "mine", "-f", "value", "-c", "endpoint").out == (
        f"{instance['endpoint']}\n"
    )
    (row,) = users.json("mia", "instance", "list", "--state", "active", "--app", "hello", "--limit", "5")
    assert (row["id"], row["endpoint"]) == (instance["id"], instance["endpoint"])
    assert users.json("max", "instance", "list") == []
    changed = users.json("mia", "instance", "set", "mine", "--property", "more=x", "--lease", "900")
    assert (changed["properties"], changed["lease_seconds"]) == ({"for": "test", "more": "x"}, 900)
    bare = users.json("mia", "instance", "set", "mine", "--no-property", "--name", "ours")
    assert (bare["properties"], bare["name"]) == ({}, "ours")
    states = [users.json("mia", "instance", verb, "ours")["state"] for verb in ("pause", "resume")]
    assert states == ["paused", "active"]
    assert users.json("mia", "instance", "suspend", "ours")["state"] == "suspended"
    assert users.json("mia", "instance", "resume", "ours")["state"] == "active"
    assert "generation" in users("mia", "instance", "console-log", "ours").out
    saved = users.json("mia", "instance", "save", "ours", "--name", "my-hello")
    assert (saved["state"], saved["app"], saved["public"]) == ("active", "hello", False)
    ended = users("mia", "instance", "delete", "ours")
    assert (ended.status, ended.err) == (0, "instance ours is ended\n")
    assert users("mia", "instance", "show", "ours").status == 3

    got = tmp_path / "my-hello.overlay"
    assert users("mia", "overlay", "download", "my-hello", "-o", got).status == 0
    assert got.stat().st_size == saved["size"]
    uploaded = users("mia", "overlay", "upload", got)
    assert "these bytes are there already, as overlay my-hello" in uploaded.err
    assert users.json("mia", "site", "overlay", "show", "my-hello")["digest"] == saved["digest"]
    begun = users.json("mia", "instance", "create", "--overlay", "my-hello", "--no-wait")
    shown = users.json("mia", "operation", "show", begun["operation_id"], "--wait")
    assert (shown["state"], shown["steps"][0]["state"]) == ("succeeded", "succeeded")
    assert begun["operation_id"] in users("mia", "operation", "list", "--kind", "instance.create").out
    assert users("mia", "operation", "cancel", begun["operation_id"]).status == 5
    assert users("mia", "instance", "delete", begun["id"], "--no-wait").status == 0

    assert users("paula", "app", "delete", "hello", "other").status == 0
    own = users.json(
        "paula",
        "app",
        "create",
        "own",
        "--overlay",
        "hello",
        "--app-version",
        "3",
        "--lease",
        "9",
        "--port",
        "8080:front",
        "--ready",
        "tcp:8080",
        "--latency",
        "20",
        "--accelerator",
        "gpu",
    )
    assert (own["version"], own["lease_seconds"]) == ("3", 9)
    assert users("paula", "app", "delete", own["id"]).err == "app own 3 is withdrawn\n"
    assert users("paula", "site", "overlay", "delete", "hello").err == "overlay hello is deleted\n"
    anew = users("paula", "app", "publish", made.overlay, "-f", "value", "-c", "name")
    assert (anew.status, anew.out) == (0, "hello\n")
    kinds = [event["kind"] for event in users.json("mia", "event", "list", "--kind", "instance")]
    assert kinds[:2] == ["instance.requested", "instance.active"]
    followed = users("mia", "event", "list", "--follow", "--after", "0", "--limit", "3", "-f", "json")
    numbers = [json.loads(line)["number"] for line in followed.out.splitlines()]
    assert len(numbers) == 3
    text = users("mia", "event", "list", "--follow", "--after", str(numbers[0]), "--limit", "1")
    assert text.out.startswith(f"{numbers[1]} 20")


@pytest.fixture
def exported(made: Made, tmp_path: Path) -> Path:
    """The base that all have, as a file: who deletes it from a site deletes a copy."""
    file = tmp_path / "fake-base.base"
    export_base(BaseStore(made.cache / "bases").get(made.base_id), file)
    return file


@pytest.fixture
def users_elsewhere(monkeypatch: pytest.MonkeyPatch, options: Options, tmp_path: Path) -> Iterator[Users]:
    """Users of a site without any base."""
    machine = replace(options.machine, cache_dir=tmp_path / "cache")
    with serving(replace(options, machine=machine)) as running:
        yield Users(monkeypatch, running.call.url)


def test_bases_and_the_site(users_elsewhere: Users, exported: Path, made: Made, tmp_path: Path) -> None:
    users = users_elsewhere
    sent = users.json("paula", "base", "upload", exported)
    assert (sent["name"], sent["state"], sent["identity"]) == ("fake-base", "active", made.base_id)
    again = users("paula", "base", "upload", exported)
    assert (again.status, again.err) == (0, f"it is there already, as base fake-base, {sent['id']}\n")
    assert [row["id"] for row in users.json("mia", "site", "base", "list")] == [sent["id"]]
    assert users.json("mia", "site", "base", "show", "fake-base")["memory_bytes"] == 4 << 20
    assert users("paula", "site", "base", "delete", "fake-base").status == 4
    got = tmp_path / "got.base"
    downloaded = users("mia", "base", "download", "fake-base", "-o", got)
    assert (downloaded.status, downloaded.out) == (0, ""), downloaded.err
    assert got.read_bytes() == exported.read_bytes()
    assert users("mia", "base", "download", "nothing", "-o", got).status == 3
    with web_serving(exported.read_bytes()) as web:
        there = users("paula", "base", "fetch", f"{web.url}/whole")
        assert (there.status, there.out) == (5, "")
        assert "this base is here already" in there.err
        assert users("root", "site", "base", "delete", sent["id"]).status == 0
        fetched = users.json("paula", "base", "fetch", f"{web.url}/whole", "--name", "fetched")
        assert (fetched["name"], fetched["identity"]) == ("fetched", made.base_id)
        assert users("root", "site", "base", "delete", fetched["id"]).status == 0
        begun = users.json("paula", "base", "fetch", f"{web.url}/whole", "--no-wait")
        assert users("paula", "operation", "show", begun["operation_id"], "--wait").status == 0
        assert users.json("mia", "site", "base", "show", begun["id"])["name"] == "fake-base"
        missing = users("paula", "base", "fetch", f"{web.url}/missing")
        assert (missing.status, missing.out) == (3, "")
    assert users("paula", "base", "fetch", "ftp://x/y").status == 2
    site = users.json("mia", "site", "show")
    assert (site["state"], site["hypervisor"], site["used"]["instances"]) == ("up", "fake", 0)


def test_a_site_is_drained(users: Users, made: Made) -> None:
    assert users("paula", "app", "publish", made.overlay).status == 0
    assert users("mia", "instance", "create", "hello").status == 0
    assert users("paula", "drain").status == 4
    drained = users("root", "drain", "--no-handoff", "-f", "json")
    assert (drained.status, drained.err) == (0, "the site admits no more instances; still there: 1\n")
    assert [site["state"] for site in json.loads(drained.out)] == ["draining"]
    assert users.json("mia", "site", "show")["state"] == "draining"
    refused = users("mia", "instance", "create", "hello", "--name", "second")
    assert (refused.status, refused.out) == (6, "")
    assert refused.err.startswith("cloudlet: the site is being emptied, and admits no instance (")
    assert users("mia", "instance", "delete", "hello").status == 0
    back = users("root", "drain", "--off", "-f", "value", "-c", "state")
    assert (back.out, back.err) == ("up\n", "the site admits instances\n")
    assert users("mia", "instance", "create", "hello").status == 0


def test_exit_codes_and_what_to_do(
    users: Users, made: Made, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert users("paula", "app", "publish", made.overlay).status == 0
    assert users("paula", "app", "publish", made.overlay, "--app-version", "2").status == 0
    (tmp_path / "wrong").write_text("wrong\n")
    wrong = users("mia", "--password-file", tmp_path / "wrong", "instance", "list")
    assert (wrong.status, wrong.out) == (4, "")
    assert wrong.err == "cloudlet: the user or the password is wrong (send credentials)\n"
    assert users("mia", "app", "delete", "hello").status == 5
    several = users("mia", "instance", "create", "hello")
    assert several.status == 5
    assert "2 apps are called hello" in several.err
    assert "(version 2)" in several.err
    app = next(row for row in users.json("mia", "app", "list") if row["version"] == "2")
    assert users("mia", "app", "delete", app["id"]).status == 4
    nothing = users("mia", "instance", "show", "nothing")
    assert (nothing.status, nothing.err[:48]) == (3, "cloudlet: there is no instance 'nothing' at this")
    for bad in (["--port", "x"], ["--url", "http://x/"], ["--lease", "0"]):
        assert users("mia", "instance", "create", app["id"], *bad).status == 2, bad
    assert users("mia", "instance", "set", "nothing").status == 3
    assert users("mia", "--site", "somewhere", "site", "show").status == 2
    assert users("mia", "--os-cloud", "nowhere", "site", "show").status == 2
    limits = replace(running.site.options.limits, instances=0)
    running.site.reload(replace(running.site.options, limits=limits))
    full = users("mia", "instance", "create", app["id"])
    assert (full.status, full.out) == (6, "")
    assert "instances" in full.err
    broken = tmp_path / "broken"
    broken.write_bytes(made.overlay.read_bytes()[:-1] + b"!")
    assert users("mia", "overlay", "upload", broken, "--name", "b").status == 7
    broken.write_bytes(b"no overlay")
    assert users("mia", "overlay", "upload", broken).status == 7
    monkeypatch.delenv("CLOUDLET_PASSWORD")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    missing = run("instance", "list")
    assert (missing.status, missing.err) == (
        2, "cloudlet: the password of mia is missing (give --password-file, or set CLOUDLET_PASSWORD)\n",
    )  # fmt: skip


def test_the_site_that_is_served_here(
    options: Options, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    none = run("instance", "list")
    assert (none.status, none.out) == (1, "")
    assert "api.sock (start one with: cloudlet serve" in none.err
    private = replace(
        options, listening=Listening(path=tmp_path / "state" / "api.sock"), auth_strategy="noauth"
    )
    with serving(private):
        assert run("instance", "list", "-f", "json").out == "[]\n"
        assert run("--quiet", "overlay", "upload", made.overlay, "-f", "value", "-c", "state").err == ""
        monkeypatch.setenv("CLOUDLET_SITE", f"unix:{tmp_path}/elsewhere")
        assert run("site", "show").status == 1
        here = run("--site", f"unix:{tmp_path}/state/api.sock", "site", "show", "-c", "state", "-f", "value")
        assert here.out == "up\n"


def test_debug_shows_calls_but_no_password(users: Users, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    done = users("mia", "--debug", "--password-file", tmp_path / "password", "instance", "list", "-f", "json")
    assert (done.status, done.out) == (0, "[]\n")
    assert f"REQ: curl -g -i -X GET {users.url}/v1/instances" in done.err
    assert "RESP: [200]" in done.err
    assert PASSWORD not in done.err
    assert "Basic " not in done.err
    assert "REQ:" not in users("mia", "instance", "list").err


def test_the_next_command_goes_on_where_the_last_was_cut(
    users: Users, made: Made, running: Running, tmp_path: Path
) -> None:
    large = large_overlay(made, tmp_path)
    size, target = large.stat().st_size, tmp_path / "got"
    there = Users(users.monkeypatch, "")
    with relayed(address(users.url), ("up", 400_000), ends=True) as relay:
        there.url = relay.url
        cut = there("paula", "app", "publish", large)
        assert (cut.status, cut.out) == (1, "")
        assert "no cloudlet answers at" in cut.err
    (half,) = running.call.get("/v1/overlays")["overlays"]
    here = int(running.call("HEAD", f"/v1/overlays/{half['id']}/file").headers["Upload-Offset"])
    assert half["state"] == "uploading"
    with relayed(address(users.url)) as relay:
        there.url = relay.url
        assert there("paula", "app", "publish", large).status == 0
        assert 0 < size - here < relay.carried["up"] < size - 200_000
    (whole,) = running.call.get("/v1/overlays")["overlays"]
    assert (whole["id"], whole["state"]) == (half["id"], "active")
    part = tmp_path / f".got.{whole['digest'][:16]}.part"
    part.write_bytes(large.read_bytes()[:400_000])
    with relayed(address(users.url)) as relay:
        there.url = relay.url
        assert there("mia", "overlay", "download", "large", "-o", target).status == 0
        assert relay.carried["down"] < size - 350_000
    assert target.read_bytes() == large.read_bytes()
    assert not part.exists()


def test_ctrl_c_takes_an_instance_back(options: Options, made: Made) -> None:
    reached, gate = threading.Event(), threading.Event()

    def observe(kind: str, step: str, _state: str) -> None:
        if (kind, step) == ("instance.create", "synthesise"):
            reached.set()
            gate.wait(30)

    with serving(options, observe) as running:
        running.call.publish(made.overlay)
        arguments = ["--site", running.call.url, "--user", "mia", "instance", "create", "hello"]
        process = subprocess.Popen(
            [sys.executable, "-m", "cloudlet.cli.app", *arguments],
            env={**os.environ, "CLOUDLET_PASSWORD": PASSWORD},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert reached.wait(30)
            time.sleep(0.3)  # until it waits
            process.send_signal(signal.SIGINT)
            running.call.wait_event(
                "instance.deleting", running.call.get("/v1/instances")["instances"][0]["id"]
            )
        finally:
            gate.set()
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (130, "")
        assert err == "cancelled: nothing of the instance is left\n"
        assert running.call.get("/v1/instances")["instances"] == []


def test_the_openstack_client_has_the_same_commands(call: Caller, made: Made) -> None:
    app = call.publish(made.overlay)
    instance = call.as_("mia").start(app)
    program = Path(sys.executable).with_name("openstack")
    who = ["--os-auth-type", "http_basic", "--os-endpoint", call.url, "--os-username", "mia"]
    commands = [
        ["cloudlet", "instance", "list", "-f", "json"],
        ["cloudlet", "overlay", "show", "nothing"],
    ]
    processes = [
        subprocess.Popen(
            [program, *who, "--os-password", PASSWORD, *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command in commands
    ]  # fmt: skip
    listed, shown = [process.communicate(timeout=60) for process in processes]
    assert processes[0].returncode == 0, listed[1]
    (row,) = json.loads(listed[0])
    assert (row["id"], row["endpoint"]) == (instance["id"], instance["endpoints"][0]["url"])
    assert (processes[1].returncode, shown[0]) == (3, "")
    assert "there is no overlay 'nothing' at this site" in shown[1]


def test_completion_knows_the_commands() -> None:
    done = run("complete")
    assert done.status == 0
    assert "cmds_instance='console-log create delete follow list pause" in done.out
    assert "--no-wait" in done.out
