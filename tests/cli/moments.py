"""Commands that are killed or told to end at a chosen moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cli.traces import DEADLINE, traces
from tests.conftest import CommandLine
from tests.images.build import TestImage

RUN_SECONDS, CREATE_SECONDS, IMPORT_SECONDS = 1.3, 2.3, 9.0
"""About how long the commands take here; moments are chosen up to there."""
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Cut:
    """A command that a signal ended."""

    status: int
    err: str
    seconds: float
    """From the signal to the end."""
    delay: float
    traces: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.status == 130 and not self.traces and "Traceback" not in self.err and self.seconds < 10.0

    def __str__(self) -> str:
        return f"after {self.delay:.3f} s: status {self.status}, left {self.traces}, said {self.err!r}"


def cut(
    cloudlet: CommandLine,
    arguments: list[str | Path],
    number: signal.Signals,
    delay: float,
    *folders: Path,
    again_after: float | None = None,
) -> Cut:
    """Send a signal to a command, as a terminal does to its whole process group, and see what is left.

    :param delay: seconds after the command hears signals (for SIGKILL: after its start).
    :param again_after: so much later a second time.
    """
    process = subprocess.Popen(
        # Who runs the tests under nohup does not want to see that here.
        ["env", "--default-signal=HUP,INT,TERM", *cloudlet.argv(*arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cloudlet.environment,
        process_group=0,
    )
    try:
        if number is not signal.SIGKILL:
            _wait_until_it_hears(process, number)
        time.sleep(delay)  # The moment is what is being tried.
        began = time.monotonic()
        _signal_group(process, number)
        if again_after is not None:
            time.sleep(again_after)
            _signal_group(process, number)
        try:
            _, err = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - began
    return Cut(process.returncode, err, seconds, delay, traces(cloudlet.settings, *folders))


def import_arguments(image: TestImage) -> list[str | Path]:
    assert image.kernel and image.initrd
    memory = f"{image.memory_mib}M"
    kernel = ["--kernel", image.kernel, "--initrd", image.initrd, "--cmdline", image.cmdline]
    return ["base", "import", image.disk, "--name", "imported", "--memory", memory, *kernel]


def create_arguments(base_id: str, recipe: Path, output: Path) -> list[str | Path]:
    return ["overlay", "create", base_id, "--recipe", recipe, "-o", output]


def killed(cloudlet: CommandLine, arguments: list[str | Path], delay: float) -> list[str]:
    """What is left of a command after its death and one ``cloudlet ps``."""
    done = cut(cloudlet, arguments, signal.SIGKILL, delay)
    assert done.status in (-signal.SIGKILL, 0), done
    listed = cloudlet("ps")
    assert listed.status == 0, listed.err
    return traces(cloudlet.settings)


def told_to_end(
    cloudlet: CommandLine, arguments: list[str | Path], longest: float, rng: random.Random, *folders: Path
) -> Cut:
    """A random signal at a random moment, half the time twice in quick succession."""
    again = rng.uniform(0, 0.1) if rng.random() < 0.5 else None
    return cut(cloudlet, arguments, rng.choice(ENDS), rng.uniform(0, longest), *folders, again_after=again)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait_until_it_hears(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Until then the signal would meet the interpreter's start, which is not ours to test."""
    # SIGTERM tells: the interpreter itself handles SIGINT from its start.
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)
    raise AssertionError(f"the command does not hear {number.name}")
