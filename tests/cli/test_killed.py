"""Commands that are killed or told to end, at random moments: nothing stays, and nothing else is touched."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cloudlet.hypervisor.records import ProcessId, Workspace, abandon, processes_of, read_record
from cloudlet.settings import Settings
from tests.cli.conftest import Hello
from tests.cli.moments import (
    CREATE_SECONDS,
    IMPORT_SECONDS,
    RUN_SECONDS,
    create_arguments,
    cut,
    import_arguments,
    killed,
    told_to_end,
)
from tests.cli.traces import DEADLINE, marked, running, traces
from tests.conftest import CommandLine
from tests.images.build import TestImage, build

pytestmark = pytest.mark.qemu

SEED = 20240605


@pytest.fixture
def image(images: Path) -> TestImage:
    return build("quick", images)


def test_run_killed_at_any_moment_leaves_nothing(hello: Hello, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(6):
        delay = rng.uniform(0, RUN_SECONDS)
        assert killed(cloudlet, ["run", hello.path], delay) == [], f"killed after {delay:.3f} s"


def test_a_machine_beside_it_is_untouched(hello: Hello, cloudlet: CommandLine) -> None:
    with running(cloudlet, hello.path) as other:
        before = processes_of(other.folder)
        assert len(before) == 2
        for delay in (0.75, 1.0, 1.25):
            cut(cloudlet, ["run", hello.path], signal.SIGKILL, delay)
            assert other.id in cloudlet("ps").out
            assert sorted(p.pid for p in marked(cloudlet.settings)) == sorted(p.pid for p in before)
        assert [Path(trace).name for trace in traces(cloudlet.settings)][:1] == [other.id]
        with urllib.request.urlopen(other.url, timeout=10) as answer:
            assert answer.status == 200


def test_overlay_create_killed_leaves_nothing(hello: Hello, cloudlet: CommandLine, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    output = tmp_path / "output"
    output.mkdir()
    create = create_arguments(hello.base_id, hello.recipe, output / "x.overlay")
    for _ in range(2):
        delay = rng.uniform(0.5, CREATE_SECONDS)
        assert killed(cloudlet, create, delay) == [], f"killed after {delay:.3f} s"
        assert list(output.iterdir()) in ([], [output / "x.overlay"])


def test_base_import_killed_leaves_nothing(image: TestImage, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(2):
        delay = rng.uniform(0.4, IMPORT_SECONDS * 0.8)
        assert killed(cloudlet, import_arguments(image), delay) == [], f"killed after {delay:.3f} s"


def test_run_told_to_end_at_any_moment(hello: Hello, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(9):
        done = told_to_end(cloudlet, ["run", hello.path], RUN_SECONDS, rng)
        assert done.clean, done


def test_overlay_create_told_to_end(hello: Hello, cloudlet: CommandLine, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    output = tmp_path / "output"
    output.mkdir()
    create = create_arguments(hello.base_id, hello.recipe, output / "x.overlay")
    for _ in range(3):
        done = told_to_end(cloudlet, create, 0.9, rng, output)
        assert done.clean, done
        assert list(output.iterdir()) == []


def test_base_import_told_to_end(image: TestImage, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(2):
        done = told_to_end(cloudlet, import_arguments(image), 3.0, rng)
        assert done.clean, done


def test_a_recipe_on_this_machine_is_told_to_end_too(
    hello: Hello, cloudlet: CommandLine, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    fifo = tmp_path / "here"
    os.mkfifo(fifo)
    (recipe / "recipe.yaml").write_text(f"name: x\nprepare: ['echo $$ > {fifo}; sleep 600; true']\n")
    process = cloudlet.start("overlay", "create", hello.base_id, "--recipe", recipe, "-o", tmp_path / "x")
    shell = ProcessId.of(int(fifo.read_text()))
    child = _children(shell.pid)
    done = cloudlet.end(process)
    assert done.status == 130
    assert not shell.alive()
    assert not any(sleeper.alive() for sleeper in child)


def test_qemu_killed_ends_the_command(hello: Hello, cloudlet: CommandLine) -> None:
    with running(cloudlet, hello.path) as machine:
        record = read_record(machine.folder)
        assert record and record.machine
        record.machine.kill()
        _, err = machine.process.communicate(timeout=DEADLINE)
        assert machine.process.returncode == 1
        assert err.splitlines()[-1].startswith("cloudlet: the machine was ended, or ended by itself")
        assert traces(cloudlet.settings) == []


def test_the_network_process_killed_ends_the_machine(hello: Hello, cloudlet: CommandLine) -> None:
    """A machine that nobody can reach is of no use: better an end that is seen."""
    with running(cloudlet, hello.path) as machine:
        record = read_record(machine.folder)
        assert record and record.network
        record.network.kill()
        _, err = machine.process.communicate(timeout=DEADLINE)
        assert machine.process.returncode == 1
        assert err.splitlines()[-1].startswith(
            "cloudlet: the machine's network was ended, or ended by itself"
        )
        assert traces(cloudlet.settings) == []


def test_what_runs_for_a_command_is_in_sessions_of_its_own(hello: Hello, cloudlet: CommandLine) -> None:
    """Or Ctrl-C on the terminal would end the machine before the command could."""
    with running(cloudlet, hello.path) as machine:
        processes = processes_of(machine.folder)
        assert len(processes) == 2
        for process in processes:
            assert os.getsid(process.pid) != os.getsid(machine.process.pid)
            assert os.getpgid(process.pid) != os.getpgid(machine.process.pid)


def test_nohup_outlives_the_terminal(hello: Hello, cloudlet: CommandLine, settings: Settings) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(cloudlet, hello.path) as machine:
            machine.process.send_signal(signal.SIGHUP)
            with urllib.request.urlopen(machine.url, timeout=10) as answer:
                assert answer.status == 200
            assert machine.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def _children(pid: int) -> list[ProcessId]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [ProcessId.of(int(child)) for child in children]


def test_what_was_killed_before_it_had_a_lock_is_removed(cloudlet: CommandLine) -> None:
    for folder in (cloudlet.settings.instances_dir, cloudlet.settings.bases_dir):
        (folder / ".new-0123abcd").mkdir(parents=True)
    assert cloudlet("ps").status == 0
    assert traces(cloudlet.settings) == []


def test_what_an_interrupted_command_still_holds_is_removed(settings: Settings) -> None:
    """An interrupt can fall between the making of a workspace and its being remembered."""
    kept, ours = settings.bases_dir, settings.instances_dir
    with Workspace.create(kept) as other:
        workspace = Workspace.create(ours)
        sleeper = subprocess.Popen(["sleep", "600"], env=workspace.environment())
        abandon(ours)
        assert sleeper.wait(DEADLINE) == -signal.SIGKILL
        assert not workspace.path.exists()
        assert other.path.exists()
    workspace.remove()


CONNECTING = """
import os, signal, socket, sys, threading
from pathlib import Path
from cloudlet.hypervisor.qemu.monitor import Monitor

def answer():
    connection, _ = listening.accept()
    connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\\r\\n')
    connection.recv(1)  # what the client asks next is never answered
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)  # who was started in the background ignores it
listening = socket.create_server(sys.argv[1], family=socket.AF_UNIX)
threading.Thread(target=answer, daemon=True).start()
try:
    Monitor(Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_while_the_monitor_is_reached_makes_no_noise(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONNECTING, tmp_path / "monitor"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "")
