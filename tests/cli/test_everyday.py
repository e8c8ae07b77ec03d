"""The commands as people use them, from a key to a machine that answers, and what they print."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from cloudlet.settings import Settings
from tests.cli.conftest import Hello, write_recipe
from tests.cli.damage import flipped
from tests.cli.test_corruption import refused
from tests.cli.traces import DEADLINE, first_line, running, traces
from tests.conftest import CommandLine

SEED = 20240605
ESCAPE = "\x1b"


def answers(url: str) -> bytes:
    with urllib.request.urlopen(f"{url}/hello/word", timeout=10) as answer:
        assert answer.status == 200
        return bytes(answer.read())


@pytest.mark.qemu
def test_a_base_is_carried_to_another_site(
    made: Hello, own_base: Path, settings: Settings, cloudlet: CommandLine, tmp_path: Path
) -> None:
    exported = tmp_path / "quick.base"
    assert cloudlet("base", "export", made.base_id[:12], "-o", exported).status == 0
    shutil.rmtree(settings.cache_dir)
    assert cloudlet("base", "list", "-f", "json").json == []

    rng = random.Random(SEED)
    whole = exported.read_bytes()
    # Name and date, too: all of the document has a digest.
    places = [20, whole.index(b'"created"'), whole.index(b'"name"') + 9]
    for at in [*places, *(rng.randrange(len(whole)) for _ in range(2))]:
        damaged = tmp_path / "damaged.base"
        damaged.write_bytes(flipped(whole, at, rng.randrange(8)))
        refused(cloudlet("base", "import", damaged), 7)
        assert traces(settings, tmp_path) == []
        assert list(settings.bases_dir.glob("*")) in ([], [settings.bases_dir / ".lock"])

    for _ in range(2):
        shown = cloudlet("base", "import", exported, "-f", "json").json
        assert isinstance(shown, dict)
        assert shown["id"] == made.base_id
    (listed,) = cloudlet("base", "list", "-f", "json").json  # type: ignore[misc]
    assert listed["id"] == made.base_id[:16]
    assert cloudlet("base", "verify", listed["name"]).status == 0

    shutil.copytree(made.keys, settings.keys_dir)
    with running(cloudlet, made.path) as machine:
        assert answers(machine.url) == b"from the recipe"
        assert f"cloudlet stop {machine.id}" in refused(cloudlet("base", "delete", listed["name"]), 5)
    assert cloudlet("base", "delete", listed["name"]).status == 0
    assert cloudlet("base", "list", "-f", "json").json == []


@pytest.mark.qemu
def test_an_overlay_is_shown_verified_signed_and_compared(
    hello: Hello, settings: Settings, cloudlet: CommandLine, tmp_path: Path
) -> None:
    shown = cloudlet("overlay", "show", hello.path, "-f", "json").json
    assert isinstance(shown, dict)
    assert (shown["name"], shown["version"], shown["ports"]) == ("hello", "1.2", "8080")
    assert shown["base"] == hello.base_id
    assert shown["signed_by"].startswith("default (")
    assert cloudlet("overlay", "verify", hello.path).err == "hello 1.2 is whole, signed by default\n"

    assert cloudlet("key", "create", "second").status == 0
    again = tmp_path / "again.overlay"
    assert cloudlet("overlay", "sign", hello.path, "--key", "second", "-o", again).status == 0
    resigned = cloudlet("overlay", "show", again, "-f", "json").json
    assert isinstance(resigned, dict)
    assert resigned["signed_by"].startswith("second (")
    assert resigned["id"] == shown["id"]
    assert cloudlet("overlay", "sign", again).status == 0
    assert again.read_bytes() == hello.path.read_bytes()
    difference = cloudlet("overlay", "diff", hello.path, again, "-f", "json").json
    assert isinstance(difference, dict)
    assert difference["same"] is True

    (tmp_path / "recipe" / "more").mkdir(parents=True)
    recipe = write_recipe(tmp_path / "other")
    (recipe / "files" / "word").write_bytes(os.urandom(50_000))
    create = ["overlay", "create", hello.base_id, "--recipe", recipe, "-o", again, "--unsigned", "-f", "json"]
    report = cloudlet(*create).json
    assert isinstance(report, dict)
    assert report["bytes"] == again.stat().st_size > 50_000
    difference = cloudlet("overlay", "diff", hello.path, again, "-f", "json").json
    assert isinstance(difference, dict)
    assert difference["same"] is False
    assert difference["disk_blocks_only_second"] + difference["disk_blocks_different"] >= 12


def test_keys_come_and_go(cloudlet: CommandLine, tmp_path: Path) -> None:
    assert cloudlet("key", "create").status == 0
    refused(cloudlet("key", "create"), 5)
    pem = cloudlet("key", "show").out
    assert pem.startswith("-----BEGIN PUBLIC KEY-----\n")
    (tmp_path / "x.pub").write_text(pem)
    assert cloudlet("key", "trust", "me-elsewhere", tmp_path / "x.pub").status == 0
    listed = cloudlet("key", "list", "-f", "json").json
    assert [(key["name"], key["signs"], key["trusted"]) for key in listed] == [  # type: ignore[attr-defined]
        ("default", "yes", "yes"),
        ("me-elsewhere", "no", "yes"),
    ]
    assert cloudlet("key", "distrust", "me-elsewhere").status == 0
    private = cloudlet.settings.keys_dir / "signing" / "default.pem"
    assert private.stat().st_mode & 0o777 == 0o600


def test_the_schema_of_a_recipe(cloudlet: CommandLine) -> None:
    schema = cloudlet("overlay", "recipe", "schema").json
    assert isinstance(schema, dict)
    assert {"name", "files", "run", "ports", "ready"} <= set(schema["properties"])


@pytest.mark.qemu
def test_run_prints_one_line_of_json(hello: Hello, cloudlet: CommandLine) -> None:
    process = cloudlet.start("run", hello.path, "-f", "json", "--rate", "1M", "--start", "full")
    document = json.loads(first_line(process))
    done = cloudlet.end(process)
    assert (done.status, done.out) == (130, "")
    assert {name: type(value) for name, value in document.items()} == {
        "id": str, "app": str, "version": str, "endpoint": str, "endpoints": list, "base": str,
        "overlay": str, "signed_by": str, "bytes": int, "identity_renewed": bool, "seconds": dict,
        "start": str, "start_because": str, "start_hint": str, "paging": type(None),
    }  # fmt: skip
    assert document["endpoints"] == [{"url": document["endpoint"], "guest_port": 8080, "name": "web"}]
    assert document["bytes"] == hello.path.stat().st_size
    assert (document["start"], document["start_because"]) == ("full", "it was asked for")
    moments = document["seconds"]
    assert list(moments) == ["root", "started", "resumed", "answering", "ready"]
    assert list(moments.values()) == sorted(moments.values())
    # 1 Mbit/s; the machine may be slow, a link may not be faster than it is.
    expected = document["bytes"] / 125_000
    assert 0.9 * expected < moments["resumed"] < 1.1 * expected + 2.0


@pytest.mark.qemu
def test_machines_are_listed_and_stopped(hello: Hello, cloudlet: CommandLine) -> None:
    first, second = (cloudlet.start("run", hello.path) for _ in range(2))
    try:
        urls = [first_line(process) for process in (first, second)]
        assert len(set(urls)) == 2
        assert [answers(url) for url in urls] == [b"from the recipe"] * 2
        listed = cloudlet("ps", "-f", "json").json
        assert isinstance(listed, list)
        assert sorted(machine["endpoints"] for machine in listed) == sorted(urls)
        assert {(machine["name"], machine["state"]) for machine in listed} == {("hello", "running")}
        assert "name one" in refused(cloudlet("stop", "hello"), 5)
        assert cloudlet("stop", listed[0]["id"]).status == 0
        assert cloudlet("stop", "hello").status == 0
        assert cloudlet("ps", "-f", "json").json == []
        for process in (first, second):
            _, err = process.communicate(timeout=DEADLINE)
            assert process.returncode == 1
            assert "was ended" in err.splitlines()[-1]
    finally:
        for process in (first, second):
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.qemu
@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_a_port_of_ones_own_choice(host: str, hello: Hello, cloudlet: CommandLine) -> None:
    try:
        with socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip(f"this system has no {host}")
    written = f"[{host}]" if ":" in host else host
    with running(cloudlet, hello.path, "-p", f"{written}:{port}:8080") as machine:
        assert machine.url == f"http://{written}:{port}"
        assert answers(machine.url) == b"from the recipe"


@pytest.mark.qemu
def test_quiet_says_nothing_but_what_was_asked_for(hello: Hello, cloudlet: CommandLine, tmp_path: Path):
    process = cloudlet.start("-q", "run", hello.path)
    assert first_line(process).startswith("http://")
    done = cloudlet.end(process)
    assert (done.status, done.err) == (130, "")
    assert cloudlet("-q", "key", "create", "x").err == ""
    assert cloudlet("-q", "overlay", "verify", hello.path).err == ""


def test_in_a_pipe_nothing_is_drawn(hello: Hello, cloudlet: CommandLine) -> None:
    for command in (["overlay", "verify", hello.path], ["base", "verify", hello.base_id], ["base", "list"]):
        done = cloudlet(*command, FORCE_COLOR="", TERM="xterm-256color")
        assert ESCAPE not in done.out + done.err
        assert "\r" not in done.out + done.err


def test_on_a_terminal_a_bar_is_drawn_unless_quiet(hello: Hello, cloudlet: CommandLine) -> None:
    assert ESCAPE in on_a_terminal(cloudlet, "base", "verify", hello.base_id)
    assert ESCAPE not in on_a_terminal(cloudlet, "-q", "base", "verify", hello.base_id)


def on_a_terminal(cloudlet: CommandLine, *arguments: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        cloudlet.argv(*arguments), stdin=theirs, stdout=theirs, stderr=theirs,
        env={**cloudlet.environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    text = b""
    deadline = time.monotonic() + DEADLINE
    try:
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                text += os.read(ours, 4096)
            except OSError:  # the other end is closed: the command has ended
                break
        assert process.wait(DEADLINE) == 0, text
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return text.decode()


def test_who_reads_no_more_is_not_told_of_it(own_base: Path, cloudlet: CommandLine) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run(
            cloudlet.argv("base", "list"), stdout=theirs, stderr=subprocess.PIPE, text=True,
            env=cloudlet.environment, timeout=DEADLINE, check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")
