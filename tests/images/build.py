"""Guest images that our own base builder did not make, for the tests of ``cloudlet base import``.

Each image has a shell script of its name beside this file, which builds it into a cache folder as
root and returns at once when it is there. This module runs the script and says how the image is
started. It starts no virtual machine.

From a shell: ``python -m tests.images.build CACHE [NAME ...]``.
"""

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

_SCRIPTS = Path(__file__).parent

# The calibrations and self-tests that the quick guest leaves out cost half a second under TCG.
_QUICK_CMDLINE = "console=ttyS0 quiet no_timer_check tsc=reliable mitigations=off cryptomgr.notests"


@dataclass(frozen=True, slots=True)
class TestImage:
    """One image on disk and how to start it.

    ``disk`` is raw or qcow2, by its suffix. Without ``kernel`` the firmware starts the disk:
    SeaBIOS, or OVMF if ``uefi``. ``ready`` is what shows that the guest is up: ``agent``,
    ``serial:TEXT`` or ``http:PORT/PATH`` (any HTTP status). ``memory_mib`` is what the guest was
    tried with.
    """

    __test__ = False  # its name begins like a test's, but it holds none

    disk: Path
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    uefi: bool
    ready: str
    memory_mib: int


def _images(cache: Path) -> dict[str, TestImage]:
    quick = TestImage(
        disk=cache / "quick.raw",
        kernel=cache / "quick.vmlinux",
        initrd=cache / "quick.initrd",
        cmdline=_QUICK_CMDLINE,
        uefi=False,
        ready="agent",
        memory_mib=128,
    )
    firmware = replace(quick, kernel=None, initrd=None, cmdline="", memory_mib=512)
    return {
        "quick": quick,
        # The same files: one word on the command line leaves the agent out.
        "serial": replace(quick, cmdline=_QUICK_CMDLINE + " agent=off", ready="serial:cloudlet-test ready"),
        "alpine": TestImage(
            disk=cache / "alpine.qcow2",
            kernel=cache / "alpine.kernel",
            initrd=cache / "alpine.initrd",
            # Without rootflags=rw the root stays read-only and its service never starts.
            cmdline="root=/dev/vda rw rootflags=rw rootfstype=ext4 console=ttyS0"
            " quicksand_token=test quicksand_port=8080",
            uefi=False,
            ready="serial:Listening on 0.0.0.0:8080",
            memory_mib=512,
        ),
        "grub-bios": replace(firmware, disk=cache / "grub-bios.qcow2"),
        "uefi": replace(firmware, disk=cache / "uefi.raw", uefi=True),
    }


NAMES = tuple(_images(Path()))


def build(name: str, cache: Path) -> TestImage:
    """Return the image ``name``, building it into ``cache`` first if it is not there.

    The files are shared by all who use the cache and must not be written to: put a qcow2 over
    ``disk``, or import it. Two builders of one image wait for each other.

    :raises KeyError: no image has this name
    :raises subprocess.CalledProcessError: the script failed; its words are on stderr
    """
    cache = cache.absolute()
    image = _images(cache)[name]
    cache.mkdir(parents=True, exist_ok=True)
    script = _SCRIPTS / f"{image.disk.stem}.sh"
    with (cache / f".{image.disk.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            [script, cache],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHON": sys.executable},
        )
    return image


if __name__ == "__main__":
    for wanted in sys.argv[2:] or NAMES:
        print(build(wanted, Path(sys.argv[1])))
