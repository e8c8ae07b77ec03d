"""``cloudlet overlay ...``: making, looking at and vouching for overlays."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blake3 import blake3
from cliff.show import ShowOne

from cloudlet.cli.command import CloudletCommand
from cloudlet.cli.console import attach
from cloudlet.cli.progress import progress_bar
from cloudlet.control import publishing, recipe
from cloudlet.control.profile import WarmUp
from cloudlet.control.publishing import Published
from cloudlet.errors import RefusedError, UsageError
from cloudlet.hypervisor.driver import Instance
from cloudlet.model import GuestPort, PublishedPort, Readiness, format_bytes
from cloudlet.output import written
from cloudlet.overlay.apply import verify_only
from cloudlet.overlay.diff import SpaceDifference, compare
from cloudlet.overlay.pages import Space
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import App
from cloudlet.overlay.sign import Sign, resign
from cloudlet.store.keyring import DEFAULT
from cloudlet.transfer.source import open_source

Columns = tuple[Sequence[str], Sequence[Any]]


class Create(CloudletCommand, ShowOne):
    """Make an overlay: start a private instance of BASE, change it by a recipe or by hand, capture it.

    Example: cloudlet overlay create debian-12 --recipe examples/route-planner -o route-planner.overlay
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("base", metavar="BASE", help="the base VM, by name or the beginning of its id")
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="FILE", help="the file to write"
        )
        how = parser.add_mutually_exclusive_group(required=True)
        how.add_argument("--recipe", type=Path, metavar="DIR", help="a folder with recipe.yaml and files")
        how.add_argument("--interactive", action="store_true", help="change it by hand, on its console")
        parser.add_argument("--name", help="with --interactive: the app's name (default: the file's)")
        parser.add_argument("--app-version", default="1", help="with --interactive: the app's version")
        parser.add_argument(
            "--ready", help="with --interactive: the app's readiness rule (default: the base's)"
        )
        parser.add_argument(
            "-p",
            "--port",
            type=int,
            action="append",
            default=[],
            help="with --interactive: a port the app listens on",
        )
        parser.add_argument(
            "--seed", type=Path, metavar="ISO", help="with --interactive: a medium for the optical drive"
        )
        parser.add_argument("--key", default=DEFAULT, help=f"the key to sign with (default: {DEFAULT})")
        parser.add_argument("--unsigned", action="store_true", help="do not sign it")
        parser.add_argument(
            "--no-profile",
            action="store_true",
            help="without the trial at the end that shows what is needed first: the app will not start early",
        )
        parser.add_argument(
            "--plain-delta",
            action="store_true",
            help="also measure the plain delta, for the report (costs CPU time)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        site = self.app.site()
        if wrong := [port for port in parsed_args.port if not 1 <= port <= 65535]:
            raise UsageError(f"-p {wrong[0]}: a port is a number from 1 to 65535")
        base = site.bases.find(parsed_args.base)
        sign: Sign | None = None if parsed_args.unsigned else site.keys.signer(parsed_args.key)
        with progress_bar("packing", quiet=self.app.quiet) as progress:
            if parsed_args.recipe:
                published = publishing.create_overlay(
                    site,
                    base,
                    parsed_args.recipe,
                    parsed_args.output.absolute(),
                    build_folder=build_folder(site.settings.cache_dir, parsed_args.recipe),
                    sign=sign,
                    say=self.app.say,
                    progress=progress,
                    plain_delta=parsed_args.plain_delta,
                    profile=not parsed_args.no_profile,
                )
            else:
                app = App(
                    name=parsed_args.name or parsed_args.output.name.partition(".")[0],
                    version=parsed_args.app_version,
                    ports=tuple(GuestPort(port) for port in parsed_args.port),
                    ready=Readiness.parse(parsed_args.ready) if parsed_args.ready else base.description.ready,
                )
                recipe.check_app(app)
                published = publishing.create_interactively(
                    site,
                    base,
                    app,
                    parsed_args.output.absolute(),
                    until=self._by_hand,
                    sign=sign,
                    say=self.app.say,
                    ports=[PublishedPort(port) for port in parsed_args.port],
                    seed=parsed_args.seed,
                    progress=progress,
                    profile=not parsed_args.no_profile,
                )
        return _report(published, base.bytes_on_disk())

    def _by_hand(self, instance: Instance) -> None:
        for endpoint in instance.endpoints:
            self.app.say(f"port {endpoint.guest_port} of the guest is {endpoint.host}:{endpoint.host_port}")
        attach(instance, sys.stdin, self.app.stderr)


class _OneOverlay(CloudletCommand):
    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "overlay", metavar="OVERLAY", help="a file, an http(s) URL, or - for standard input"
        )
        return parser


class Show(_OneOverlay, ShowOne):
    """Show what an overlay says of itself; reads no more than its root."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        with open_source(parsed_args.overlay, sys.stdin.buffer) as source:
            reader = OverlayReader(source, None, allow_unsigned=True)
        root = reader.root
        key_id = reader.signature[:32].hex()[:16]
        names = {key.key_id.hex()[:16]: key.name for key in self.app.site().keys.all() if key.trusted}
        by = f"{names.get(key_id, 'a key that is not trusted here')} ({key_id})" if key_id else "nobody"
        values = {
            "name": root.app.name,
            "version": root.app.version,
            "summary": root.app.summary,
            "id": reader.identity,
            "signed_by": by,
            "created": root.created,
            "base": root.base,
            "ports": " ".join(str(port.port) for port in root.app.ports),
            "ready": str(root.app.ready),
            "publish": root.app.publish.value,
            "machine": root.machine.machine_type,
            "made_for": f"{root.machine.accelerator}/{root.machine.cpu_model}",
            "memory_bytes": root.machine.memory_bytes,
            "disk_bytes": root.machine.disk_bytes,
            "bytes": reader.header.file_bytes,
            "ram_pages": root.totals.ram_pages,
            "disk_blocks": root.totals.disk_pages,
            "literals": root.totals.literals,
            "frames": root.totals.frames,
            "hot_frames": len(root.hot_frames),
            "hot_pages": sum(entry.pages for entry in root.hot_frames),
            "hot_bytes": sum(entry.size for entry in root.hot_frames),
            "bytes_to_start": reader.header.parts_start + sum(entry.size for entry in root.listed_frames),
            "device_bytes": root.totals.device_bytes,
        }
        return tuple(values), tuple(values.values())


class Verify(_OneOverlay):
    """Read all of an overlay and check its signature and every part; needs no base."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--allow-unsigned", action="store_true", help="check it even if nobody signed it")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        ring = self.app.site().keys
        with (
            open_source(parsed_args.overlay, sys.stdin.buffer) as source,
            progress_bar("verifying", in_bytes=True, quiet=self.app.quiet) as progress,
        ):
            reader = OverlayReader(source, ring.verify, allow_unsigned=parsed_args.allow_unsigned)
            verify_only(reader, progress)
        signed = f"signed by {reader.signed_by}" if reader.signed_by else "not signed"
        self.app.say(f"{reader.root.app.name} {reader.root.app.version} is whole, {signed}")


class PutSignature(_OneOverlay):
    """Sign an overlay with a key of yours, in place of the signature it has.

    Example: cloudlet overlay sign route-planner.overlay --key release
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="write here (default: in place)"
        )
        parser.add_argument("--key", default=DEFAULT, help=f"the key to sign with (default: {DEFAULT})")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        site = self.app.site()
        output = parsed_args.output or Path(parsed_args.overlay)
        if not parsed_args.output and not output.is_file():
            raise UsageError("what is not a file cannot be signed in place", hint="give --output")
        signer = site.keys.signer(parsed_args.key)
        with open_source(parsed_args.overlay, sys.stdin.buffer) as source, written(output) as out:
            # Nobody has to trust the old signature to put a new one: all parts are checked on the way.
            resign(OverlayReader(source, None, allow_unsigned=True), out, signer)
        self.app.say(f"{output} is signed by {parsed_args.key}")


class Reorder(_OneOverlay, ShowOne):
    """Make a new, newly signed overlay of the same pages, those that are needed first in front.

    A trial on this machine shows which these are: the app resumes, answers, gets its identity, and is used
    by the --warm-up commands as its users will use it. The new overlay starts early.

    Example: cloudlet overlay reorder old.overlay -o new.overlay --warm-up 'curl -sf "$CLOUDLET_ENDPOINT/"'
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="FILE", help="the file to write"
        )
        parser.add_argument(
            "--warm-up",
            action="append",
            default=[],
            metavar="COMMAND",
            help="a shell command that uses the app at $CLOUDLET_ENDPOINT; may be given several times",
        )
        parser.add_argument("--key", default=DEFAULT, help=f"the key to sign with (default: {DEFAULT})")
        parser.add_argument("--unsigned", action="store_true", help="do not sign the new one")
        parser.add_argument(
            "--allow-unsigned", action="store_true", help="take an old one that nobody signed"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        site = self.app.site()
        if obstacle := site.hypervisor.early_obstacle():
            raise RefusedError("there can be no trial here", hint=obstacle)
        sign: Sign | None = None if parsed_args.unsigned else site.keys.signer(parsed_args.key)
        with (
            open_source(parsed_args.overlay, sys.stdin.buffer) as source,
            progress_bar("packing", quiet=self.app.quiet) as progress,
        ):
            published = publishing.reorder(
                site,
                source,
                parsed_args.output.absolute(),
                sign=sign,
                say=self.app.say,
                allow_unsigned=parsed_args.allow_unsigned,
                warm_up=WarmUp(parsed_args.warm_up, Path.cwd()),
                progress=progress,
            )
        return _report(published, site.bases.get(published.report.base).bytes_on_disk())


class Diff(CloudletCommand, ShowOne):
    """Compare two overlays of one base: what each brings, and what is the same."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("first", metavar="OVERLAY", help="an overlay")
        parser.add_argument("second", metavar="OVERLAY", help="another one")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        site = self.app.site()
        with ExitStack() as stack:
            readers = [
                OverlayReader(
                    stack.enter_context(open_source(name, sys.stdin.buffer)), None, allow_unsigned=True
                )
                for name in (parsed_args.first, parsed_args.second)
            ]
            base = site.bases.get(readers[0].root.base)
            pages = stack.enter_context(base.pages())
            difference = compare(readers[0], readers[1], pages)
        values: dict[str, Any] = {
            "same": readers[0].identity == readers[1].identity,
            "bytes_first": difference.first_bytes,
            "bytes_second": difference.second_bytes,
            "devices_equal": difference.device_state_equal,
            **_space("ram_pages", difference.ram),
            **_space("disk_blocks", difference.disk),
        }
        return tuple(values), tuple(values.values())


class RecipeSchema(CloudletCommand):
    """Print the JSON Schema of recipe.yaml."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        self.app.stdout.write(json.dumps(recipe.schema(), indent=2) + "\n")


def build_folder(cache: Path, recipe_folder: Path) -> Path:
    """Where a recipe's ``prepare`` keeps what it makes: another place for each recipe, by its whole path."""
    place = recipe_folder.resolve()
    digest = blake3(os.fsencode(place)).hexdigest()
    return cache / "recipes" / f"{place.name}-{digest[:12]}"


def _space(name: str, difference: SpaceDifference) -> dict[str, int]:
    return {
        f"{name}_equal": difference.equal.size,
        f"{name}_different": difference.different.size,
        f"{name}_only_first": difference.only_first.size,
        f"{name}_only_second": difference.only_second.size,
    }


def _report(published: Published, base_bytes: int) -> Columns:
    report = published.report
    values: dict[str, Any] = {
        "overlay": str(published.path),
        "id": report.identity,
        "bytes": report.file_bytes,
        "size": format_bytes(report.file_bytes),
        "changed_bytes": report.changed_pages * 4096,
        "ratio_to_full_image": round(report.file_bytes / base_bytes, 4),
    }
    if report.plain_delta_bytes:
        values["plain_delta_bytes"] = report.plain_delta_bytes
        values["ratio_to_plain_delta"] = round(report.file_bytes / report.plain_delta_bytes, 3)
    for space, noun in ((Space.RAM, "ram_pages"), (Space.DISK, "disk_blocks")):
        for operation, number in sorted(report.pages[space].items()):
            values[f"{noun}_{operation.name.lower()}"] = number
    values |= {
        "bytes_pages": report.frame_bytes,
        "bytes_map": report.map_bytes,
        "bytes_devices": report.device_bytes,
        "bytes_index": report.index_bytes,
        "bytes_head": report.head_bytes,
        "hot_frames": report.hot_frames,
        "hot_bytes": report.hot_bytes,
        "seconds_paused": round(published.pause_seconds, 3),
    }
    for part, seconds in published.paused.items():
        values[f"seconds_paused_{part.replace(' ', '_')}"] = round(seconds, 3)
    for step, seconds in published.seconds.items():
        values["seconds_" + step.replace(" ", "_").replace("/", "_of_")] = seconds
    return tuple(values), tuple(values.values())
