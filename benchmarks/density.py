"""What a further instance of one base costs in memory, beside a machine restored from a full stream."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import REFERENCE_PORT, Reference, wait_agent, wait_answer
from benchmarks.lab import MODEL_MIB, Lab
from benchmarks.results import Results
from benchmarks.starts import saved
from cloudlet.control.synthesis import resume_base
from cloudlet.hypervisor.records import ProcessId, read_record

COUNTS = (1, 2, 4, 8)
_IDLE_SECONDS = 3.0
_MEMORY = re.compile(r"/memfd:cloudlet-(base|app)-| rw-p 00000000 [0-9a-f:]+ 1 +/$")
"""What a guest's RAM maps: a base's or an app's memory file, or the page server's mount, which is a file."""


def density(lab: Lab, results: Results) -> None:
    """The memory of 1, 2, 4 and 8 idle instances of the base, each having answered once.

    PSS of QEMU and of its network process, so that what several share is counted once; of it the part
    of the guest's RAM that is the instance's own, which is what of the sealed memory file it has written to.
    """
    base = lab.base()
    with ExitStack() as stack:
        folders: list[Path] = []
        for count in COUNTS:
            while len(folders) < count:
                instance = stack.enter_context(resume_base(lab.site, base))
                wait_agent(instance)
                folders.append(instance.directory)
            time.sleep(_IDLE_SECONDS)
            memory = sum((memory_of(folder) for folder in folders), Counter[str]())
            for part, kib in memory.items():
                results.add(f"density.{count}.{part}_mib", kib / 1024)
    ends = COUNTS[0], COUNTS[-1]
    for part in ("qemu", "network", "all", "ram_own", "ram_shared"):
        first, last = (results.samples.get(f"density.{count}.{part}_mib", [0.0])[-1] for count in ends)
        results.add(f"density.further.{part}_mib", (last - first) / (ends[1] - ends[0]))


def restored(lab: Lab, results: Results) -> None:
    """The same for the application's machine, restored by QEMU from its full stream."""
    with saved(lab, results) as (disk, stream):
        descriptor = os.open(stream, os.O_RDONLY)
        with plain.run(lab.settings, disk, REFERENCE_PORT, incoming=descriptor) as instance:
            os.close(descriptor)
            plain.run_on(instance)
            wait_answer(instance, Reference(MODEL_MIB, lab.seed), 60.0)
            time.sleep(_IDLE_SECONDS)
            results.add("density.restored.all_mib", memory_of(instance.directory)["all"] / 1024)


def memory_of(folder: Path) -> Counter[str]:
    """KiB of an instance's processes, by what they are for: PSS; and what of it is the guest's RAM, or code.

    The code is what QEMU has translated the guest's into, where it emulates.
    """
    record = read_record(folder)
    assert record and record.machine and record.network
    memory: Counter[str] = Counter()
    for name, process in (("qemu", record.machine), ("network", record.network), ("pages", record.pages)):
        if process:
            memory.update(_of_process(process, name))
    memory["all"] = memory["qemu"] + memory["network"] + memory["pages"]
    return memory


def _of_process(process: ProcessId, name: str) -> Counter[str]:
    memory: Counter[str] = Counter()
    of_ram = of_code = False
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        field, _, rest = line.partition(":")
        if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+ .*", line):
            of_ram, of_code = bool(_MEMORY.search(line)), " rwxp " in line
        elif field == "Pss":
            memory[name] += int(rest.split()[0])
            if of_ram:
                memory["ram_shared"] += int(rest.split()[0])
            elif of_code:
                memory["translated"] += int(rest.split()[0])
        elif field == "Rss" and of_ram:
            memory["ram_mapped"] += int(rest.split()[0])
        elif field == "Anonymous" and of_ram:
            memory["ram_own"] += int(rest.split()[0])
    return memory
