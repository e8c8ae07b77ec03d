"""The accelerator is what really works here, and what was found out is remembered.

What ``choose`` looks at, the CPU's flags and /dev/kvm, is shown to it in a mount namespace of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cloudlet.hypervisor.qemu.accelerator import DEADLINE, choose, probe
from cloudlet.model import Accelerator
from tests.images.build import build

KERNEL = Path("/bin/true")  # something to open: what is started in these tests does not look at it
as_root = pytest.mark.skipif(bool(os.geteuid()), reason="only root can mount")

_CHOOSE = """
import json, sys
from pathlib import Path
from cloudlet.hypervisor.qemu.accelerator import choose
asked = []
def kernels():
    asked.append(1)
    return [Path(name) for name in given["kernels"]]
for given in json.loads(sys.argv[1]):
    if "memory" in given:
        Path(sys.argv[2]).write_text(given["memory"])
    asked.clear()
    choice = choose("auto", given["binary"], tuple(given["version"]), Path(sys.argv[2]), kernels)
    print(json.dumps([choice.accelerator, choice.cpu_model, choice.reason, bool(asked)]))
"""


class World:
    """A machine with a CPU and maybe /dev/kvm, and programs in QEMU's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = folder / "state" / "accelerator.json"
        self.speaking = self.qemu("speaking", "echo a kernel")
        self.silent = self.qemu("silent", "exit 0")

    def qemu(self, name: str, script: str) -> str:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def choose(
        self, *steps: dict[str, Any], flags: str = "fpu svm", vendor: str = "AuthenticAMD", kvm: bool = True
    ) -> list[list[Any]]:
        """What is chosen, step by step: accelerator, CPU model, reason, whether it was probed."""
        usual = {"binary": self.speaking, "version": [7, 2], "kernels": [str(KERNEL)]}
        (self.folder / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
        device = "touch /dev/kvm" if kvm else "true"
        mounts = (
            f"mount --bind {self.folder}/cpuinfo /proc/cpuinfo && mount -t tmpfs none /dev"
            f" && mknod /dev/null c 1 3 && {device} && exec "
        )
        command = [sys.executable, "-c", _CHOOSE, json.dumps([usual | step for step in steps])]
        result = subprocess.run(
            ["unshare", "--mount", "sh", "-c", mounts + '"$@"', "sh", *command, str(self.memory)],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("wanted", ["kvm", "tcg"])
def test_what_is_configured_is_not_probed(tmp_path: Path, wanted: str) -> None:
    def kernels() -> list[Path]:
        raise AssertionError("nothing is to be probed")

    choice = choose(wanted, "/bin/false", (7, 2), tmp_path / "memory", kernels)
    assert (choice.accelerator, choice.reason) == (Accelerator(wanted), "as configured")
    assert choice.cpu_model
    assert not (tmp_path / "memory").exists()


@as_root
def test_without_dev_kvm_it_is_tcg(world: World) -> None:
    assert world.choose({}, kvm=False) == [["tcg", "Nehalem", "/dev/kvm cannot be opened", False]]
    assert not world.memory.exists()


@as_root
def test_without_the_cpus_help_it_is_tcg(world: World) -> None:
    ((accelerator, _, reason, probed),) = world.choose({}, flags="fpu sse4_2")
    assert (accelerator, probed) == ("tcg", False)
    assert "neither svm nor vmx" in reason


@as_root
@pytest.mark.parametrize(
    ("flags", "vendor", "model"), [("svm", "AuthenticAMD", "EPYC"), ("vmx", "GenuineIntel", "Nehalem")]
)
def test_what_was_found_is_remembered(world: World, flags: str, vendor: str, model: str) -> None:
    first, second = world.choose({}, {"binary": "/bin/false"}, flags=flags, vendor=vendor)
    assert first[:2] == ["kvm", model]
    assert "printed after" in first[2]
    assert first[3]
    assert second == ["kvm", model, f"{first[2]} (remembered)", False]


@as_root
def test_that_it_does_not_work_is_remembered_too(world: World) -> None:
    first, second = world.choose({"binary": world.silent}, {})
    assert first[:2] == ["tcg", "Nehalem"]
    assert "under kvm printed nothing" in first[2]
    assert second == ["tcg", "Nehalem", f"{first[2]} (remembered)", False]


@as_root
def test_a_memory_of_something_else_is_none(world: World) -> None:
    world.choose({})
    whole = world.memory.read_text()
    damaged = ["", whole[:-5], "[]", whole.replace("Linux", "Another"), whole.replace('"kvm"', '"magic"')]
    for accelerator, _, reason, probed in world.choose(*({"memory": memory} for memory in damaged)):
        assert (accelerator, probed) == ("kvm", True), reason
    assert json.loads(world.memory.read_text()).keys() == json.loads(whole).keys()
    ((accelerator, _, _, probed),) = world.choose({"version": [8, 0], "binary": world.silent})
    assert (accelerator, probed) == ("tcg", True)


@as_root
def test_without_a_kernel_there_is_nothing_to_probe_with(world: World) -> None:
    ((accelerator, _, reason, _),) = world.choose({"kernels": []})
    assert accelerator == "tcg"
    assert "no kernel" in reason
    assert not world.memory.exists(), "a base that is built later may have one"


def test_one_that_hangs_is_ended(world: World) -> None:
    began = time.monotonic()
    hangs = world.qemu("hangs", "exec sleep 100")
    works, finding = probe(hangs, KERNEL, Accelerator.TCG, deadline=0.3)
    assert not works
    assert "printed nothing" in finding
    assert 0.3 <= time.monotonic() - began < 2.3


def test_one_that_fails_is_not_waited_for(world: World) -> None:
    began = time.monotonic()
    works, _ = probe("/bin/false", KERNEL, Accelerator.TCG)
    assert not works
    assert time.monotonic() - began < 2.0


@pytest.mark.qemu
def test_a_real_kernel_prints_under_tcg(images: Path) -> None:
    kernel = build("quick", images).kernel
    assert kernel
    works, finding = probe("qemu-system-x86_64", kernel, Accelerator.TCG, deadline=30.0)
    assert works, finding


@pytest.mark.qemu
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm")
def test_kvm_that_hangs_is_found_out_within_the_deadline(images: Path) -> None:
    kernel = build("quick", images).kernel
    assert kernel
    began = time.monotonic()
    works, finding = probe("qemu-system-x86_64", kernel, Accelerator.KVM)
    assert time.monotonic() - began < DEADLINE + 2.0
    if works:
        pytest.skip(f"KVM works here: {finding}")
    assert "under kvm printed nothing" in finding
