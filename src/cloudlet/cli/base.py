"""``cloudlet base ...``: the base VMs of this site."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cliff.lister import Lister
from cliff.show import ShowOne

from cloudlet.cli.command import CloudletCommand
from cloudlet.cli.progress import progress_bar
from cloudlet.control import bases
from cloudlet.errors import UsageError
from cloudlet.hypervisor.records import records
from cloudlet.model import MEBIBYTE, Firmware, Readiness, format_bytes, parse_size
from cloudlet.store.bases import Base
from cloudlet.store.exchange import export_base, import_base

Columns = tuple[Sequence[str], Sequence[Any]]


class _MakesBase(CloudletCommand, ShowOne):
    """Options that building and importing share."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--memory", default="512M", metavar="SIZE", help="the guest's RAM (default: 512M)"
        )
        parser.add_argument("--cpus", type=int, default=1, metavar="N", help="virtual CPUs (default: 1)")
        parser.add_argument(
            "--ready",
            default="agent",
            metavar="RULE",
            help="when the guest is ready: agent, tcp:22, http:8080/ or serial:REGEX (default: agent)",
        )
        return parser

    def request(self, parsed: argparse.Namespace, name: str, firmware: Firmware) -> bases.BaseRequest:
        memory = parse_size(parsed.memory)
        if memory % (2 * MEBIBYTE) or memory < 64 * MEBIBYTE:
            raise UsageError("--memory must be at least 64M and a multiple of 2M")
        if not 1 <= parsed.cpus <= 64:
            raise UsageError("--cpus must be between 1 and 64")
        return bases.BaseRequest(
            name=name,
            memory_bytes=memory,
            disk_bytes=parse_size(parsed.disk) if parsed.disk else 0,
            cpus=parsed.cpus,
            firmware=firmware,
            ready=Readiness.parse(parsed.ready),
        )


class Build(_MakesBase):
    """Build a base VM from packages, boot it once, and capture it.

    Example: cloudlet base build --disk 8G --memory 1G --name debian-large
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--disk", default="4G", metavar="SIZE", help="4G or 8G, say (default: 4G)")
        parser.add_argument("--name", default="debian-12", help="what to call it (default: debian-12)")
        parser.add_argument(
            "--guest",
            default="debian",
            metavar="NAME|DIR",
            help="a guest recipe of ours, or a folder with a 'build' program (default: debian)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        request = self.request(parsed_args, parsed_args.name, Firmware.BIOS)
        site = self.app.site()
        with progress_bar("pages", quiet=self.app.quiet) as progress:
            base = bases.build(site, request, parsed_args.guest, self.app.say, progress)
        return _columns(base)


class Import(_MakesBase):
    """Make a base VM from a disk image (raw, qcow2, vmdk ...), or take one that another site exported.

    Example: cloudlet base import jammy-server-cloudimg-amd64.img --cloud-init --memory 1G
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "image", metavar="IMAGE", type=Path, help="a disk image, or a file from 'base export'"
        )
        parser.add_argument("--name", help="what to call it (default: the file's name)")
        parser.add_argument("--disk", metavar="SIZE", help="make the disk larger than the image")
        parser.add_argument(
            "--kernel", type=Path, metavar="FILE", help="boot this kernel, not the image's loader"
        )
        parser.add_argument("--initrd", type=Path, metavar="FILE", help="with this initial RAM disk")
        parser.add_argument("--cmdline", default="", help="and this command line")
        parser.add_argument("--uefi", action="store_true", help="boot by UEFI instead of BIOS")
        parser.add_argument(
            "--cloud-init",
            action="store_true",
            help="give cloud-init a seed (Ubuntu, CentOS, Debian cloud images)",
        )
        parser.add_argument(
            "--seed", type=Path, metavar="ISO", help="give the first boot this medium instead"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        name = parsed_args.name or parsed_args.image.name.partition(".")[0]
        site = self.app.site()
        with progress_bar("reading", in_bytes=True, quiet=self.app.quiet) as progress:
            if (base := import_base(site.bases, parsed_args.image, parsed_args.name, progress)) is not None:
                return _columns(base)
        firmware = Firmware.UEFI if parsed_args.uefi else Firmware.BIOS
        with progress_bar("pages", quiet=self.app.quiet) as progress:
            base = bases.import_image(
                site,
                self.request(parsed_args, name, firmware),
                parsed_args.image,
                self.app.say,
                progress,
                kernel=parsed_args.kernel,
                initrd=parsed_args.initrd,
                cmdline=parsed_args.cmdline,
                seed=parsed_args.seed,
                cloud_init=parsed_args.cloud_init,
            )
        return _columns(base)


class List(CloudletCommand, Lister):
    """List the base VMs that are here."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        rows = [
            (
                base.name,
                base.id[:16],
                format_bytes(base.machine.memory_bytes),
                format_bytes(base.machine.disk_bytes),
                f"{base.machine.accelerator}/{base.machine.cpu_model}",
                base.created,
            )
            for base in self.app.site().bases.all()
        ]
        return ("name", "id", "memory", "disk", "made for", "created"), rows


class _OneBase(CloudletCommand):
    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("base", metavar="BASE", help="its name, or the beginning of its id")
        return parser


class Show(_OneBase, ShowOne):
    """Show a base VM: machine, contents, and what its guest can do."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return _columns(self.app.site().bases.find(parsed_args.base))


class Verify(_OneBase):
    """Read all of a base VM and compare it with what it was when it was captured."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        site = self.app.site()
        base = site.bases.find(parsed_args.base)
        with progress_bar("reading", in_bytes=True, quiet=self.app.quiet) as progress:
            site.bases.verify(base, progress)
        self.app.say(f"{base.name} is as it was captured")


class Export(_OneBase):
    """Write a base VM to one file that another site can import and verify.

    Example: cloudlet base export debian-12 -o debian-12.base
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="FILE", help="the file to write"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        base = self.app.site().bases.find(parsed_args.base)
        with progress_bar("exporting", in_bytes=True, quiet=self.app.quiet) as progress:
            size = export_base(base, parsed_args.output, progress)
        self.app.say(f"{parsed_args.output}: {format_bytes(size)}")


class Delete(_OneBase):
    """Remove a base VM; refused while an instance of it runs."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        site = self.app.site()
        base = site.bases.find(parsed_args.base)
        users = [record.id for _, record in records(site.settings.instances_dir) if record.base_id == base.id]
        site.bases.delete(base, users)
        site.images.delete_of_base(base.id)
        self.app.say(f"{base.name} is removed")


def _columns(base: Base) -> Columns:
    machine, guest = base.machine, base.description.guest
    if guest.clone_agent:
        identity = "renewed by the clone agent in one call"
    elif guest.agent:
        identity = "renewed through the guest agent"
    else:
        identity = "NOT renewed: no guest agent; clones share host name, machine id and SSH host keys"
    values = {
        "name": base.name,
        "id": base.id,
        "created": base.created,
        "memory_bytes": machine.memory_bytes,
        "disk_bytes": machine.disk_bytes,
        "cpus": machine.cpus,
        "machine": machine.machine_type,
        "accelerator": machine.accelerator.value,
        "cpu_model": machine.cpu_model,
        "firmware": machine.firmware.value,
        "boots": "kernel" if base.image().kernel else "its own boot loader",
        "ready": str(base.description.ready),
        "identity": identity,
        "device_sections": len(base.description.sections),
        "bytes_on_disk": base.bytes_on_disk(),
        "path": str(base.path),
    }
    return tuple(values), tuple(values.values())
