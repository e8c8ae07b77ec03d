"""``cloudlet instance ...``: a user's running apps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from osc_lib.cli.parseractions import KeyValueAction

from cloudlet.cli.command import printable
from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, SiteCommand, add_which, count
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.errors import CloudletError, ConflictError, UsageError

if TYPE_CHECKING:
    from cloudlet.client.resources import Instance, Operation

_CANCELLING_SECONDS = 60.0


class Create(ShowsOne):
    """Start an app, and say where it is reached when it answers.

    Ctrl-C before that takes it back: nothing of the instance is left.

    Example: cloudlet instance create route-planner --lease 3600 -f value -c endpoint
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument("app", nargs="?", metavar="APP", help="the app, by name or id")
        what.add_argument(
            "--overlay", metavar="OVERLAY", help="an overlay at the site instead, by name or id"
        )
        what.add_argument("--url", help="an overlay at this http(s) URL instead")
        parser.add_argument("--name", help="what to call it (default: as the app is called)")
        parser.add_argument("--lease", type=count, metavar="SECONDS", help="it ends so long after its start")
        parser.add_argument(
            "--port",
            action="append",
            default=[],
            metavar="HOST:GUEST",
            help="publish the app's port GUEST as HOST of the site (default: a free one); may be repeated",
        )
        parser.add_argument(
            "--property", action=KeyValueAction, metavar="K=V", help="remember this; may be repeated"
        )
        parser.add_argument("--no-wait", action="store_true", help="do not wait until it answers")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        operation = self.client.create_instance(**self._wanted(parsed_args))
        if not parsed_args.no_wait:
            operation = self.wait(operation)
        instance = self.client.get_instance(operation.resources["instance"])
        return shown.columns({**shown.instance(instance), "operation_id": operation.id})

    def _wanted(self, parsed: argparse.Namespace) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "name": parsed.name,
            "url": parsed.url,
            "app_id": self.client.find_app(parsed.app).id if parsed.app else None,
            "overlay_id": self.client.find_overlay(parsed.overlay).id if parsed.overlay else None,
            "lease_seconds": parsed.lease,
            "metadata": parsed.property,
            "ports": [_port(text) for text in parsed.port] or None,
        }
        return {name: value for name, value in wanted.items() if value is not None}

    def _interrupted(self, operation: Operation) -> None:
        try:
            with suppress(ConflictError):  # it has just ended
                self.client.cancel_operation(operation)
            ending = self.client.delete_instance(operation.resources["instance"])
            self.client.wait_for_operation(ending, timeout=_CANCELLING_SECONDS)
        except CloudletError as error:
            self.say(f"cancelled, but something is left: {error}")
        else:
            self.say("cancelled: nothing of the instance is left")


class List(Lists):
    """List the instances at a site that you may see."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--name", help="only those of this name")
        parser.add_argument("--state", help="only those in this state: active, paused, suspended, failed ...")
        parser.add_argument("--app", metavar="APP", help="only those of this app, by name or id")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        query = {"name": parsed_args.name, "state": parsed_args.state}
        if parsed_args.app:
            query["app_id"] = self.client.find_app(parsed_args.app).id
        rows = self.client.instances(max_items=parsed_args.limit, **query)
        return shown.table(("id", "name", "state", "endpoint", "expires_at"), rows, shown.instance)


class Show(ShowsOne):
    """Show an instance and where it is reached."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        instance = self.client.find_instance(parsed_args.instance)
        if instance.moved_to:
            place = _place(instance.moved_to)
            self.say(f"it is moved: it is at {place} now; cloudlet instance follow shows where it goes")
        return shown.columns(shown.instance(instance))


class Set(ShowsOne):
    """Change the name or the properties of an instance, or renew its lease.

    Example: cloudlet instance set hello --lease 3600
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        parser.add_argument("--name", help="what to call it from now on")
        parser.add_argument(
            "--lease", type=count, metavar="SECONDS", help="let it end so many seconds from now"
        )
        parser.add_argument(
            "--property", action=KeyValueAction, metavar="K=V", help="remember this, too; may be repeated"
        )
        parser.add_argument("--no-property", action="store_true", help="forget the properties it had")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        instance = self.client.find_instance(parsed_args.instance)
        changes: dict[str, Any] = {"name": parsed_args.name, "lease_seconds": parsed_args.lease}
        if parsed_args.property or parsed_args.no_property:
            before = {} if parsed_args.no_property else instance.metadata
            changes["metadata"] = {**before, **(parsed_args.property or {})}
        given = {name: value for name, value in changes.items() if value is not None}
        if not given:
            raise UsageError("nothing to change", hint="give --name, --lease or --property")
        return shown.columns(shown.instance(self.client.update_instance(instance, **given)))


class Delete(SiteCommand):
    """End instances; what they had in memory and on disk is gone.

    One that was handed off goes on where it is: it is forgotten here, and nobody is shown the way any more.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance", several=True)
        parser.add_argument("--no-wait", action="store_true", help="do not wait until they have ended")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        found = [self.client.find_instance(name) for name in parsed_args.instance]
        operations = [self.client.delete_instance(instance) for instance in found]
        for instance, operation in zip(found, operations, strict=True):
            if not parsed_args.no_wait:
                self.wait(operation)
            self.say(f"instance {instance.name} is {_going(instance, waited=not parsed_args.no_wait)}")


class Pause(Show):
    """Stop the CPUs of an instance; its memory stays where it is."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        instance = self.client.find_instance(parsed_args.instance)
        return shown.columns(shown.instance(self.client.pause_instance(instance)))


class Resume(Show):
    """Let an instance go on that is paused or suspended."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        from cloudlet.client.resources import Operation

        instance = self.client.find_instance(parsed_args.instance)
        begun = self.client.resume_instance(instance)
        if isinstance(begun, Operation):
            self.wait(begun)
        return shown.columns(shown.instance(self.client.get_instance(instance.id)))


class Suspend(Show):
    """Write an instance to the site's disk, and free its memory; resume brings it back."""

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        instance = self.client.find_instance(parsed_args.instance)
        self.wait(self.client.suspend_instance(instance))
        return shown.columns(shown.instance(self.client.get_instance(instance.id)))


class Save(ShowsOne):
    """Make an overlay of an instance as it is now, from which others can be started; it goes on.

    Example: cloudlet instance save hello --name my-hello
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        parser.add_argument("--name", required=True, help="what to call the overlay")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        instance = self.client.find_instance(parsed_args.instance)
        saved = self.wait(self.client.save_instance(instance, parsed_args.name))
        return shown.columns(shown.overlay(self.client.get_overlay(saved.resources["overlay"])))


class ConsoleLog(SiteCommand):
    """Print the end of what an instance wrote to its serial console."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "instance")
        parser.add_argument(
            "--length", type=count, metavar="BYTES", help="so many bytes at most (default: 64 KiB)"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        instance = self.client.find_instance(parsed_args.instance)
        text = self.client.console_log(instance, parsed_args.length)
        # The guest has no say in what this terminal does.
        self.app.stdout.write(printable(text.replace("\r", "")) if sys.stdout.isatty() else text)


def _going(instance: Instance, *, waited: bool) -> str:
    """What becomes of an instance that is deleted."""
    if instance.state == "moved" and instance.moved_to:
        place = _place(instance.moved_to)
        return f"{'' if waited else 'being '}forgotten here; it goes on at {place}"
    return "ended" if waited else "being ended"


def _place(moved_to: Mapping[str, Any]) -> str:
    """Where an instance is that was handed off, as far as it is known."""
    return str(moved_to["url"] or f"the cloudlet {moved_to['cloudlet_id']}")


def _port(text: str) -> dict[str, int]:
    outside, _, inside = text.partition(":")
    if not (outside.isdecimal() and inside.isdecimal()):
        raise UsageError(f"--port {text}: write HOST:GUEST", hint="such as 8000:8080; 0 is any free one")
    return {"port": int(outside), "guest_port": int(inside)}
