"""KVM where it really works, else TCG: found out by a probe with a deadline, remembered, and shown.

That ``/dev/kvm`` exists and answers proves nothing: there are hosts where a one-page guest runs and a
kernel hangs before its first character. So the probe boots a real kernel without a disk and waits for
one byte on its serial line.
"""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cloudlet.hypervisor.qemu.machine import MACHINE_TYPE, SANDBOX, TCG_CPU_MODEL
from cloudlet.model import Accelerator

DEADLINE = 4.0
"""Seconds within which a guest's kernel must print something; TCG prints after two."""

_KVM_CPU_MODELS = {"GenuineIntel": "Nehalem", "AuthenticAMD": "EPYC"}


@dataclass(frozen=True, slots=True)
class Choice:
    """An accelerator, the CPU model that goes with it, and why."""

    accelerator: Accelerator
    cpu_model: str
    reason: str


def choose(
    wanted: str,
    binary: str,
    version: tuple[int, int],
    memory: Path,
    kernels: Callable[[], list[Path]],
    confine: Sequence[str] = (),
) -> Choice:
    """The accelerator to use.

    :param wanted: ``kvm``, ``tcg``, or ``auto`` to find out.
    :param memory: file that remembers what was found out for this QEMU and kernel.
    :param kernels: Linux kernels to try KVM with, asked for only if there is something to try.
    :param confine: how a machine is confined here: one that may not open ``/dev/kvm`` cannot use it.
    """
    if wanted != "auto":
        accelerator = Accelerator(wanted)
        return Choice(accelerator, _cpu_model(accelerator), "as configured")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return _tcg("/dev/kvm cannot be opened")
    if not {"svm", "vmx"} & _cpu_flags():
        return _tcg("the CPU shows neither svm nor vmx")
    key = f"QEMU {version[0]}.{version[1]}, Linux {platform.release()}, {_cpu_vendor()}"
    if remembered := _remembered(memory, key):
        return remembered
    candidates = kernels()
    if not candidates:
        return _tcg("no kernel to probe KVM with; build a base first")
    works, finding = probe(binary, candidates[0], Accelerator.KVM, confine=confine)
    choice = Choice(Accelerator.KVM, _cpu_model(Accelerator.KVM), finding) if works else _tcg(finding)
    memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    memory.write_text(json.dumps({key: asdict(choice)}, indent=1))
    return choice


def probe(
    binary: str,
    kernel: Path,
    accelerator: Accelerator,
    deadline: float = DEADLINE,
    *,
    confine: Sequence[str] = (),
) -> tuple[bool, str]:
    """Whether a kernel prints anything within ``deadline`` seconds, and a sentence that says so."""
    try:
        with kernel.open("rb") as file:
            printed, seconds = _boot(binary, file.fileno(), accelerator, deadline, confine)
    except OSError as error:
        return False, f"{accelerator.value} could not be tried with {kernel}: {error.strerror}"
    if printed:
        return True, f"a kernel under {accelerator.value} printed after {seconds:.1f} s"
    return False, f"a kernel under {accelerator.value} printed nothing in {seconds:.1f} s"


def _boot(
    binary: str, kernel: int, accelerator: Accelerator, deadline: float, confine: Sequence[str]
) -> tuple[bool, float]:
    argv = [
        *confine, binary, "-sandbox", SANDBOX,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", MACHINE_TYPE, "-accel", accelerator.value, "-cpu", _cpu_model(accelerator), "-m", "256M",
        "-kernel", f"/proc/self/fd/{kernel}", "-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1",
        "-serial", "stdio",
    ]  # fmt: skip
    began = time.monotonic()
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(kernel,),
    ) as process:
        assert process.stdout
        try:
            printed = _first_byte(process.stdout.fileno(), began + deadline)
        finally:
            process.kill()
    return printed, time.monotonic() - began


def _first_byte(descriptor: int, deadline: float) -> bool:
    """Whether the kernel speaks: firmware prints nothing on this machine's serial line."""
    left = deadline - time.monotonic()
    ready, _, _ = select.select([descriptor], [], [], max(0.0, left))
    return bool(ready and os.read(descriptor, 1))


def _tcg(reason: str) -> Choice:
    return Choice(Accelerator.TCG, TCG_CPU_MODEL, reason)


def _remembered(memory: Path, key: str) -> Choice | None:
    try:
        known = json.loads(memory.read_text())[key]
        return Choice(
            Accelerator(known["accelerator"]), known["cpu_model"], known["reason"] + " (remembered)"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cpu_model(accelerator: Accelerator) -> str:
    if accelerator is Accelerator.TCG:
        return TCG_CPU_MODEL
    return _KVM_CPU_MODELS.get(_cpu_vendor(), TCG_CPU_MODEL)


def _cpu_flags() -> set[str]:
    return set(_cpu_line("flags").split())


def _cpu_vendor() -> str:
    return _cpu_line("vendor_id")


def _cpu_line(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
