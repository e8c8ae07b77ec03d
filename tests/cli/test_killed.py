"""Commands that are killed or told to end, at random moments: nothing stays, and nothing else is touched."""

from __future__ import annotations

import os
import random
import signal
import urllib.request
from pathlib import Path

import pytest

from cloudlet.hypervisor.records import ProcessId, processes_of, read_record
from cloudlet.settings import Settings
from tests.cli.conftest import Hello
from tests.cli.traces import DEADLINE, Cut, cut, marked, running, traces
from tests.conftest import CommandLine
from tests.images.build import TestImage, build

pytestmark = pytest.mark.qemu

SEED = 20240605
RUN_SECONDS, CREATE_SECONDS, IMPORT_SECONDS = 1.3, 2.3, 9.0
"""About how long the commands take here; moments are chosen up to there."""
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def image(images: Path) -> TestImage:
    return build("quick", images)


def import_arguments(image: TestImage) -> list[str | Path]:
    assert image.kernel and image.initrd
    memory = f"{image.memory_mib}M"
    kernel = ["--kernel", image.kernel, "--initrd", image.initrd, "--cmdline", image.cmdline]
    return ["base", "import", image.disk, "--name", "imported", "--memory", memory, *kernel]


def create_arguments(hello: Hello, output: Path) -> list[str | Path]:
    return ["overlay", "create", hello.base_id, "--recipe", hello.recipe, "-o", output]


def killed(cloudlet: CommandLine, arguments: list[str | Path], delay: float) -> list[str]:
    """What is left of a command after its death and one ``cloudlet ps``."""
    done = cut(cloudlet, arguments, signal.SIGKILL, delay)
    assert done.status in (-signal.SIGKILL, 0), done
    listed = cloudlet("ps")
    assert listed.status == 0, listed.err
    return traces(cloudlet.settings)


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
    for _ in range(2):
        delay = rng.uniform(0.5, CREATE_SECONDS)
        assert killed(cloudlet, create_arguments(hello, output / "x.overlay"), delay) == []
        assert list(output.iterdir()) in ([], [output / "x.overlay"])


def test_base_import_killed_leaves_nothing(image: TestImage, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(2):
        delay = rng.uniform(0.4, IMPORT_SECONDS * 0.8)
        assert killed(cloudlet, import_arguments(image), delay) == [], f"killed after {delay:.3f} s"


def told_to_end(
    cloudlet: CommandLine, arguments: list[str | Path], longest: float, rng: random.Random, *folders: Path
) -> Cut:
    """A random signal at a random moment, half the time twice in quick succession."""
    again = rng.uniform(0, 0.1) if rng.random() < 0.5 else None
    return cut(cloudlet, arguments, rng.choice(ENDS), rng.uniform(0, longest), *folders, again_after=again)


def test_run_told_to_end_at_any_moment(hello: Hello, cloudlet: CommandLine) -> None:
    rng = random.Random(SEED)
    for _ in range(9):
        done = told_to_end(cloudlet, ["run", hello.path], RUN_SECONDS, rng)
        assert done.clean, done


def test_overlay_create_told_to_end(hello: Hello, cloudlet: CommandLine, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    output = tmp_path / "output"
    output.mkdir()
    for _ in range(3):
        done = told_to_end(cloudlet, create_arguments(hello, output / "x.overlay"), 1.2, rng, output)
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
