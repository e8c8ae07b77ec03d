"""The machine: which devices at which addresses, as a QEMU command line.

A capture fixes its machine for ever: device state is addressed by PCI slot. So the machine has from
the start every socket it will ever need, at explicit addresses, and no device whose host side would
be part of the capture. Layout 1, on ``pcie.0`` of a q35 board (slot 31 is the board's own):

====  =======================================================================
slot  device
====  =======================================================================
4     virtio-blk, the disk
5     virtio-net, the public card (offloads off: they would be part of the state)
6     virtio-net, the private card of a composition
7     virtio-scsi with one optical drive, for recipes' files and cloud-init seeds
8     virtio-serial with the guest agent's channel
9     virtio-rng
----  VM generation ID, one serial console, UEFI variables if there are any
====  =======================================================================

There is no balloon and no virtio-mem: on a private mapping QEMU would punch holes into the base's RAM.
No graphics: its memory would be a second RAM block to capture. RAM is named as libvirt names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloudlet.model import Firmware, Machine

LAYOUT = 1
MACHINE_TYPE = "pc-q35-7.2"
TCG_CPU_MODEL = "Nehalem"
"""The least CPU that today's binary wheels and distributions ask for (x86-64-v2), and one TCG has whole."""

RAM_BLOCK = "pc.ram"
FIRMWARE_BLOCK = "pc.bios"
PUBLIC_MAC, PRIVATE_MAC = "52:54:00:c1:0d:01", "52:54:00:c1:0d:02"
UEFI_CODE = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd")
UEFI_VARS = ("/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS.fd")

_NO_OFFLOADS = ",".join(
    f"{feature}=off"
    for feature in (
        "csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo",
        "host_tso4", "host_tso6", "host_ecn", "host_ufo", "mrg_rxbuf",
    )
)  # fmt: skip

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class Backends:
    """The host's side of the machine, as descriptors that QEMU inherits.

    None of it is part of a capture. ``disk`` and ``backing`` are read and written through QEMU's
    descriptor sets, so that QEMU needs no right to any path.
    """

    ram: int
    ram_shared: bool
    disk: int
    disk_format: str
    backing: int | None
    network: int
    monitor: int
    agent: int
    console: int
    console_log: int
    kernel: int | None = None
    initrd: int | None = None
    cmdline: str = ""
    uefi_code: int | None = None
    uefi_vars: int | None = None
    optical: int | None = None
    incoming: int | None = None
    layer: int | None = None
    """The disk of an app's layer, between the machine's own and the base's."""

    def descriptors(self) -> list[int]:
        """All descriptors to be inherited."""
        numbers = (
            self.ram, self.disk, self.backing, self.network, self.monitor, self.agent, self.console,
            self.console_log, self.kernel, self.initrd, self.uefi_code, self.uefi_vars, self.optical,
            self.incoming, self.layer,
        )  # fmt: skip
        return [number for number in numbers if number is not None]


def command_line(
    binary: str,
    machine: Machine,
    backends: Backends,
    name: str,
    *,
    run: bool = True,
    generation_id: str = "",
) -> list[str]:
    """The whole command line of a machine.

    :param run: whether its CPUs run; else they wait for ``cont``.
    :param generation_id: a UUID; where it is empty, the machine gets a new one.
    """
    return [
        binary, "-name", f"guest={name}", "-nodefaults", "-no-user-config", "-display", "none",
        "-sandbox", SANDBOX,
        "-accel", machine.accelerator.value, "-cpu", f"{machine.cpu_model},enforce",
        "-smp", str(machine.cpus),
        *_memory(machine, backends),
        *_boot(machine, backends),
        *_disk(backends),
        *_cards(backends),
        *_channels(backends),
        "-device", "virtio-rng-pci,id=rng0,bus=pcie.0,addr=0x9",
        "-device", f"vmgenid,id=genid0,guid={generation_id or 'auto'}",
        *(() if run else ("-S",)),
        *(() if backends.incoming is None else ("-incoming", f"fd:{backends.incoming}")),
    ]  # fmt: skip


def _memory(machine: Machine, backends: Backends) -> Iterator[str]:
    share = "on" if backends.ram_shared else "off"
    yield from ("-m", f"{machine.memory_bytes >> 20}M")
    yield from (
        "-object",
        f"memory-backend-file,id={RAM_BLOCK},size={machine.memory_bytes},"
        f"mem-path=/proc/self/fd/{backends.ram},share={share}",
    )
    flash = ",pflash0=code0,pflash1=vars0" if machine.firmware is Firmware.UEFI else ""
    yield from ("-machine", f"{machine.machine_type},memory-backend={RAM_BLOCK}{flash}")


def _boot(machine: Machine, backends: Backends) -> Iterator[str]:
    if machine.firmware is Firmware.UEFI:
        yield from _descriptor_set(backends.uefi_code, 10)
        yield from _descriptor_set(backends.uefi_vars, 11)
        yield from ("-blockdev", _node("code0", "raw", 10) + ",read-only=on")
        yield from ("-blockdev", _node("vars0", "raw", 11))
    if backends.kernel is not None:
        yield from ("-kernel", f"/proc/self/fd/{backends.kernel}", "-append", backends.cmdline)
        if backends.initrd is not None:
            yield from ("-initrd", f"/proc/self/fd/{backends.initrd}")


def _disk(backends: Backends) -> Iterator[str]:
    yield from _descriptor_set(backends.disk, 1)
    node = _node("disk0", backends.disk_format, 1) + ",discard=unmap,detect-zeroes=unmap,file.discard=unmap"
    # The disk lasts no longer than the machine's memory, which a crash of the host ends: there is nothing
    # to wait for until it is on the host's platter. A capture's pause would be that wait for the most part.
    node += ",cache.no-flush=on,file.cache.no-flush=on"
    if backends.backing is not None:
        yield from _descriptor_set(backends.backing, 2)
        yield from ("-blockdev", _node("base0", "raw", 2) + ",read-only=on")
        node += f",backing={'base0' if backends.layer is None else 'app0'}"
    if backends.layer is not None:
        # By its number, not by a set: it may be a page server's file, which nobody has opened yet.
        file = f"file.driver=file,file.filename=/proc/self/fd/{backends.layer},file.locking=off"
        yield from ("-blockdev", f"driver=qcow2,node-name=app0,{file},read-only=on,backing=base0")
    boot_index = "" if backends.kernel is not None else ",bootindex=1"
    yield from ("-blockdev", node)
    yield from ("-device", f"virtio-blk-pci,id=disk0-card,drive=disk0,bus=pcie.0,addr=0x4{boot_index}")
    yield from ("-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x7")
    if backends.optical is not None:
        yield from _descriptor_set(backends.optical, 3)
        yield from ("-blockdev", _node("optical-medium", "raw", 3) + ",read-only=on")
    drive = ",drive=optical-medium" if backends.optical is not None else ""
    yield from ("-device", f"scsi-cd,id=optical0,bus=scsi0.0{drive}")


def _cards(backends: Backends) -> Iterator[str]:
    card = "virtio-net-pci,romfile=,bus=pcie.0,mq=off," + _NO_OFFLOADS
    yield from ("-netdev", f"stream,id=net0,server=off,addr.type=fd,addr.str={backends.network}")
    yield from ("-device", f"{card},id=public0,netdev=net0,addr=0x5,mac={PUBLIC_MAC}")
    yield from ("-netdev", "hubport,id=net1,hubid=1")
    yield from ("-device", f"{card},id=private0,netdev=net1,addr=0x6,mac={PRIVATE_MAC}")


def _channels(backends: Backends) -> Iterator[str]:
    yield from ("-chardev", f"socket,id=monitor0,fd={backends.monitor},server=on,wait=off")
    yield from ("-mon", "chardev=monitor0,mode=control")
    yield from _descriptor_set(backends.console_log, 4)
    yield from (
        "-chardev",
        f"socket,id=console0,fd={backends.console},server=on,wait=off,logfile=/dev/fdset/4,logappend=on",
    )
    yield from ("-serial", "chardev:console0")
    yield from ("-device", "virtio-serial-pci,id=channels0,bus=pcie.0,addr=0x8")
    yield from ("-chardev", f"socket,id=agent0,fd={backends.agent},server=on,wait=off")
    yield from ("-device", "virtserialport,bus=channels0.0,chardev=agent0,name=org.qemu.guest_agent.0")


def _node(name: str, driver: str, descriptor_set: int) -> str:
    # Locks would be taken on descriptors that several QEMUs of one base share: our records keep order.
    return (
        f"driver={driver},node-name={name},file.driver=file,file.filename=/dev/fdset/{descriptor_set},"
        "file.locking=off"
    )


def _descriptor_set(descriptor: int | None, number: int) -> Iterator[str]:
    assert descriptor is not None
    yield from ("-add-fd", f"fd={descriptor},set={number}")
