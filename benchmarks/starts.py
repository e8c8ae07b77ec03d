"""How soon a guest answers: resumed, synthesised, booted, restored and loaded, with all bytes here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import REFERENCE_PORT, Question, Reference, url_of, wait_agent, wait_answer
from benchmarks.lab import MODEL_MIB, Lab, copy_of, say, tool
from benchmarks.results import Results
from cloudlet.control.publishing import make_quiet
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, resume_base, synthesise
from cloudlet.hypervisor.driver import Instance
from cloudlet.hypervisor.records import cpu_seconds_of
from cloudlet.settings import Settings
from cloudlet.transfer.source import open_source


def resume(lab: Lab, results: Results) -> None:
    """A base, resumed, until its agent answers; beside the same image booted until the same answer."""
    base = lab.base()
    image = lab.booted_image()
    for _ in range(lab.times(10, 3)):
        began = time.monotonic()
        with resume_base(lab.site, base) as instance:
            results.add("resume.running_s", time.monotonic() - began)
            wait_agent(instance)
            results.add("resume.answer_s", time.monotonic() - began)
    for _ in range(lab.times(3)):
        with copy_of(image, lab.scratch) as disk:
            began = time.monotonic()
            with plain.run(lab.settings, disk, None) as instance:
                wait_agent(instance)
                results.add("boot.base_s", time.monotonic() - began)


def local(lab: Lab, results: Results) -> None:
    """Synthesis from a local overlay; the same application booted from its full image."""
    ask = Reference(MODEL_MIB, lab.seed)
    overlay = lab.overlay()
    results.add("overlay_bytes", overlay.stat().st_size)
    for turn in range(lab.times(9, 3)):
        synthesis(lab, results, "synthesis", str(overlay), ask, whole=turn == 0)
    with resume_base(lab.site, lab.base()):
        for _ in range(lab.times(5, 2)):
            synthesis(lab, results, "synthesis_beside", str(overlay), ask)
    for _ in range(lab.times(5, 1)):
        seconds = command(lab.settings, overlay, ask, "--start", "full", "--no-image")
        results.add("synthesis.command_s", seconds)
    image = lab.customised_image()
    for _ in range(lab.times(3)):
        with copy_of(image, lab.scratch) as disk:
            began = time.monotonic()
            with plain.run(lab.settings, disk, REFERENCE_PORT) as instance:
                wait_answer(instance, ask)
                results.add("boot.full_s", time.monotonic() - began)


def qemu(lab: Lab, results: Results) -> None:
    """QEMU's own ways: a full stream and a snapshot of the same running machine, saved and restored.

    The files stay in the scratch folder for the benchmarks of downloads and of sizes.
    """
    ask = Reference(MODEL_MIB, lab.seed)
    with saved(lab, results) as (disk, stream):
        for turn in range(lab.times(5, 2)):
            began = time.monotonic()
            with plain.run(lab.settings, disk, REFERENCE_PORT, extra=["-loadvm", "warm"]) as instance:
                wait_answer(instance, ask, 60.0)
                results.add("loadvm_s", time.monotonic() - began)
                if turn == 0:
                    ask.whole(url_of(instance))
        for _ in range(lab.times(5, 2)):
            tool(["qemu-img", "snapshot", "-a", "warm", str(disk.disk)])
            descriptor = os.open(stream, os.O_RDONLY)
            began = time.monotonic()
            with plain.run(lab.settings, disk, REFERENCE_PORT, incoming=descriptor) as instance:
                os.close(descriptor)
                plain.run_on(instance)
                wait_answer(instance, ask, 60.0)
                results.add("restore_s", time.monotonic() - began)


@contextmanager
def saved(lab: Lab, results: Results) -> Iterator[tuple[plain.Plain, Path]]:
    """A plain guest with the application, saved once in this run by ``savevm`` and as a full stream."""
    image = lab.customised_image()
    disk, stream = lab.scratch / "saved.qcow2", lab.scratch / "saved.stream"
    machine = replace(image, disk=disk, disk_format="qcow2")
    if stream.exists():
        yield machine, stream
        return
    ask = Reference(MODEL_MIB, lab.seed)
    tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image.disk), str(disk)])
    say("booting the full image, to save it as QEMU does")
    with plain.run(lab.settings, machine, REFERENCE_PORT) as instance:
        wait_answer(instance, ask)
        # Quiet, as ours are: what is saved of freed memory and caches would flatter us.
        make_quiet(instance.agent, has_script=True)
        wait_answer(instance, ask)
        assert instance.record.machine
        pid = instance.record.machine.pid
        for _ in range(lab.times(3)):
            instance.pause()
            used = cpu_seconds_of(pid)
            results.add("stream.save_s", plain.save_stream(instance, stream))
            results.add("stream.save_cpu_s", cpu_seconds_of(pid) - used)
            instance.resume()
        wait_answer(instance, ask)
        instance.pause()
        # The snapshot first: a machine whose stream was saved has given up its disk.
        results.add("savevm_s", plain.save_snapshot(instance, "warm"))
        plain.save_stream(instance, stream)
    results.add("stream_bytes", stream.stat().st_size)
    yield machine, stream


def synthesis(
    lab: Lab,
    results: Results,
    name: str,
    where: str,
    ask: Question,
    rate: float | None = None,
    *,
    whole: bool = False,
) -> None:
    """Synthesise once, from a file or URL, and ask: samples of the first answer and of each moment.

    :param rate: bytes per second at most.
    :param whole: look at all of the application's memory afterwards.
    """
    began = time.monotonic()

    def answered(instance: Instance) -> None:
        wait_answer(instance, ask)
        results.add(f"{name}.answer_s", time.monotonic() - began)

    with (
        open_source(where, io.BytesIO(), rate) as source,
        synthesise(lab.site, source, Request(start=Start.FULL), answering=answered) as made,
    ):
        for moment, seconds in made.timings.moments.items():
            results.add(f"{name}.at_{moment}_s", seconds)
        if whole and isinstance(ask, Reference):
            ask.whole(url_of(made.instance))


def command(
    settings: Settings,
    overlay: Path,
    ask: Question,
    *options: str,
    then: Callable[[], None] = lambda: None,
) -> float:
    """``cloudlet run`` from its start as a program to the first answer, in seconds.

    :param then: what is still to be done, or to be waited for, before it is ended.
    """
    environment = {
        **os.environ,
        "OS_DEFAULT__CACHE_DIR": str(settings.cache_dir),
        "OS_DEFAULT__STATE_DIR": str(settings.state_dir),
        "OS_DEFAULT__KEYS_DIR": str(settings.keys_dir),
    }
    began = time.monotonic()
    run = [sys.executable, "-m", "cloudlet.cli.app", "run", str(overlay), *options]
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            ask(url, 10.0)
            seconds = time.monotonic() - began
            then()
        finally:
            process.terminate()
    return seconds
