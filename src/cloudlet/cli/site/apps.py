"""``cloudlet app ...``: what publishers publish and users start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cloudlet.cli.site import shown
from cloudlet.cli.site.command import Lists, ShowsOne, SiteCommand, add_which, count
from cloudlet.cli.site.sending import Sends
from cloudlet.cli.site.shown import Columns, Table
from cloudlet.errors import UsageError


class Publish(Sends, ShowsOne):
    """Put an overlay on a site as an app that its users can start.

    The same command again changes nothing: it finds the overlay by its digest and the app by name and
    version, and after a cut it goes on where it was.

    Example: cloudlet app publish route-planner.overlay
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("file", type=Path, metavar="OVERLAY", help="the overlay's file")
        parser.add_argument("--name", help="what to call the app (default: as in the overlay)")
        parser.add_argument(
            "--app-version", metavar="VERSION", help="its version (default: as in the overlay)"
        )
        parser.add_argument("--private", action="store_true", help="for yourself only")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        inside = self.app_in(parsed_args.file)
        name = parsed_args.name or inside.name
        version = inside.version if parsed_args.app_version is None else parsed_args.app_version
        public = not parsed_args.private
        overlay = self.send_overlay(parsed_args.file, name, public=public)
        for app in self.client.apps(name=name, version=version):
            if app.overlay_id == overlay.id:
                self.say(f"app {name} {version} is published already")
                return shown.columns(shown.app(app))
        more: dict[str, Any] = {"version": version, "summary": inside.summary, "public": public}
        app = self.client.create_app(name, overlay, **more)
        self.say(f"app {name} {version} is published")
        return shown.columns(shown.app(app))


class Create(ShowsOne):
    """Make an app of an overlay that is at the site.

    Example: cloudlet app create hello --overlay my-hello --private
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("name", metavar="NAME", help="what to call it")
        parser.add_argument(
            "--overlay", required=True, metavar="OVERLAY", help="what it starts, by name or id"
        )
        parser.add_argument("--app-version", metavar="VERSION", default="", help="its version")
        parser.add_argument("--summary", default="", help="one line for people")
        parser.add_argument("--private", action="store_true", help="for yourself only")
        parser.add_argument(
            "--restart", action="store_true", help="start instances again that end by themselves"
        )
        parser.add_argument("--lease", type=count, metavar="SECONDS", help="the lease of who asks for none")
        parser.add_argument(
            "--port", type=_port, action="append", metavar="PORT[:NAME]",
            help="publish this port of the guest, and no others (default: those that the overlay names)",
        )  # fmt: skip
        parser.add_argument(
            "--ready", metavar="RULE", help="when it answers: agent, tcp:PORT, http:PORT/PATH "
            "(default: as in the overlay)",
        )  # fmt: skip
        parser.add_argument("--latency", type=float, metavar="MS", help="the latency that it needs")
        parser.add_argument("--bandwidth", type=float, metavar="MBIT", help="the bandwidth that it needs")
        parser.add_argument("--accelerator", action="append", metavar="KIND", help="what it computes with")
        parser.add_argument(
            "--early-hand-off", action="store_true", help="allow hand-offs in which an instance can be lost"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        intent = {
            "latency_ms": parsed_args.latency,
            "bandwidth_mbit": parsed_args.bandwidth,
            "accelerators": parsed_args.accelerator,
        }
        component = {"ports": parsed_args.port, "readiness": parsed_args.ready}
        more: dict[str, Any] = {
            "component": _given(component),
            "intent": _given(intent),
            "version": parsed_args.app_version,
            "summary": parsed_args.summary,
            "public": not parsed_args.private,
            "restart": parsed_args.restart,
            "handoff": {"early": parsed_args.early_hand_off},
            **_given({"lease_seconds": parsed_args.lease}),
        }
        overlay = self.client.find_overlay(parsed_args.overlay)
        return shown.columns(shown.app(self.client.create_app(parsed_args.name, overlay, **more)))


def _port(text: str) -> dict[str, Any]:
    """Read ``PORT[:NAME]``."""
    port, _, name = text.partition(":")
    return {"port": int(port), "name": name}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class List(Lists):
    """List the apps at a site."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--name", help="only those of this name")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Table:
        rows = self.client.apps(max_items=parsed_args.limit, name=parsed_args.name)
        return shown.table(("id", "name", "version", "summary", "public"), rows, shown.app)


class Show(ShowsOne):
    """Show an app at a site."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "app")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        return shown.columns(shown.app(self.client.find_app(parsed_args.app)))


class Set(ShowsOne):
    """Change an app; instances that run stay as they are.

    Example: cloudlet app set hello --overlay hello-2 --restart
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "app")
        parser.add_argument("--overlay", metavar="OVERLAY", help="what it starts from now on, by name or id")
        parser.add_argument("--summary", help="one line for people")
        parser.add_argument("--lease", type=count, metavar="SECONDS", help="the lease of who asks for none")
        seen = parser.add_mutually_exclusive_group()
        seen.add_argument("--public", action="store_true", default=None, help="for every user of the site")
        seen.add_argument(
            "--private", dest="public", action="store_false", default=None, help="for yourself only"
        )
        again = parser.add_mutually_exclusive_group()
        again.add_argument(
            "--restart",
            action="store_true",
            default=None,
            help="start instances again that end by themselves",
        )
        again.add_argument(
            "--no-restart", dest="restart", action="store_false", default=None, help="let them be ended"
        )
        early = parser.add_mutually_exclusive_group()
        early.add_argument(
            "--early-hand-off",
            action="store_true",
            default=None,
            help="allow hand-offs in which an instance can be lost",
        )
        early.add_argument(
            "--no-early-hand-off",
            dest="early_hand_off",
            action="store_false",
            default=None,
            help="allow none",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Columns:
        app = self.client.find_app(parsed_args.app)
        changes: dict[str, Any] = {
            "summary": parsed_args.summary,
            "public": parsed_args.public,
            "restart": parsed_args.restart,
            "lease_seconds": parsed_args.lease,
        }
        if parsed_args.early_hand_off is not None:
            changes["handoff"] = {"early": parsed_args.early_hand_off}
        if parsed_args.overlay:
            changes["components"] = [{"overlay_id": self.client.find_overlay(parsed_args.overlay).id}]
        given = {name: value for name, value in changes.items() if value is not None}
        if not given:
            raise UsageError("nothing to change", hint="cloudlet help app set")
        return shown.columns(shown.app(self.client.update_app(app, **given)))


class Delete(SiteCommand):
    """Withdraw apps; refused while instances of them run. Their overlays stay."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "app", several=True)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        for app in [self.client.find_app(name) for name in parsed_args.app]:
            self.client.delete_app(app)
            self.say(f"app {app.name} {app.version} is withdrawn")


class Prestage(SiteCommand):
    """Have the site fetch what an app needs before somebody asks for it."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_which(parser, "app")
        parser.add_argument("--no-wait", action="store_true", help="do not wait until it is there")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        app = self.client.find_app(parsed_args.app)
        operation = self.client.prestage_app(app)
        if parsed_args.no_wait:
            self.say(f"it comes: cloudlet operation show {operation.id} --wait")
        else:
            self.wait(operation)
            self.say(f"all that {app.name} {app.version} needs is at the site")
