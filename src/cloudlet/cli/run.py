"""``cloudlet run``, ``ps`` and ``stop``: synthesised machines on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from cliff.lister import Lister

from cloudlet.cli.command import CloudletCommand
from cloudlet.cli.progress import progress_bar
from cloudlet.control.delivery import PATIENCE
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, Synthesised, synthesise
from cloudlet.errors import ConflictError, FailedError, NotFoundError, UsageError
from cloudlet.hypervisor.driver import Instance, Paging, RunState
from cloudlet.hypervisor.qemu.page_server import read_progress
from cloudlet.hypervisor.records import processes_of, records
from cloudlet.model import PublishedPort, format_bytes, parse_rate
from cloudlet.transfer.source import open_source


class Run(CloudletCommand):
    """Synthesise a machine from an overlay, print where it answers, and run it until Ctrl-C.

    OVERLAY is a file, an http(s) URL or - for standard input. The first URL on standard output is the
    endpoint; with -f json all endpoints, the seconds of each step and the bytes are one line of JSON.

    An overlay that says what is needed first starts early: the machine resumes with its first bytes, and the
    rest follows while it runs (cloudlet ps shows how far it is). An app that was here before starts from its
    image (cloudlet image list), and nothing is downloaded but the overlay's head.

    Example: cloudlet run https://example.org/route-planner.overlay -p 8000:8080
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "overlay", metavar="OVERLAY", help="a file, an http(s) URL, or - for standard input"
        )
        parser.add_argument(
            "-p",
            "--port",
            action="append",
            default=[],
            metavar="[ADDRESS:]HOST:GUEST",
            help="publish the guest's port GUEST as HOST (default: a free port on 127.0.0.1)",
        )
        parser.add_argument(
            "--rate", metavar="RATE", help="read no faster than this, for trials: 10M is 10 Mbit/s"
        )
        parser.add_argument("--allow-unsigned", action="store_true", help="run it even if nobody signed it")
        parser.add_argument(
            "--start",
            choices=[start.value for start in Start],
            help="when to resume: hot, at once; ready, with all pages that its publisher's trial touched; "
            "full, when all is here. Default: from the app's image if there is one, else hot where the "
            "overlay says what is needed first and the rest takes a while, else full",
        )
        parser.add_argument(
            "--patience",
            type=_seconds,
            default=PATIENCE,
            metavar="SECONDS",
            help="end the machine when it has waited so long for a page, or the source has sent nothing for "
            f"so long (default: {PATIENCE:.0f})",
        )
        parser.add_argument(
            "--no-image", action="store_true", help="neither use the app's image nor leave one"
        )
        parser.add_argument(
            "-f", "--format", choices=("text", "json"), default="text", help="how to print (default: text)"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        ports = [_published(text) for text in parsed_args.port]
        rate = parse_rate(parsed_args.rate) if parsed_args.rate else None
        as_json = parsed_args.format == "json"
        site = self.app.site()
        request = Request(
            ports=ports,
            allow_unsigned=parsed_args.allow_unsigned,
            start=Start(parsed_args.start) if parsed_args.start else None,
            patience=parsed_args.patience,
            use_image=not parsed_args.no_image,
        )
        given_out = False

        arrival = _Arrival(self.app.say)

        def give_out(instance: Instance) -> None:
            nonlocal given_out
            given_out = True
            bar.close()
            self._print_endpoints(instance)

        with (
            open_source(parsed_args.overlay, sys.stdin.buffer, rate, patience=parsed_args.patience) as source,
            ExitStack() as bar,
            synthesise(
                site,
                source,
                request,
                progress=bar.enter_context(progress_bar("receiving", in_bytes=True, quiet=self.app.quiet)),
                answering=None if as_json else give_out,
                arrived=arrival.here,
            ) as synthesised,
        ):
            bar.close()
            if as_json:
                print(json.dumps(_document(synthesised)), flush=True)
            else:
                if not given_out:
                    self._print_endpoints(synthesised.instance)
                self._tell(synthesised)
            arrival.ready(synthesised)
            instance = synthesised.instance
            instance.wait()
            raise FailedError(f"{_what_ended(instance)} was ended, or ended by itself", hint="run it again")

    def _print_endpoints(self, instance: Instance) -> None:
        for endpoint in instance.endpoints:
            print(endpoint.url, flush=True)

    def _tell(self, synthesised: Synthesised) -> None:
        app, moments = synthesised.root.app, synthesised.timings.moments
        self.app.say(
            f"{app.name} {app.version}, instance {synthesised.instance.id}: answering after "
            f"{moments['answering']:.2f} s, ready after {moments['ready']:.2f} s; Ctrl-C ends it"
        )
        started = synthesised.started
        if started.from_image:
            self.app.say("started from its image")
        elif paging := started.progress():
            self.app.say(
                f"started with {format_bytes(paging.received)} of {format_bytes(paging.bytes)}: "
                f"{started.choice.why}"
            )
        if started.choice.hint:
            self.app.say(f"it could answer sooner: {started.choice.hint}")
        if not synthesised.renewed:
            self.app.say("its identity could not be renewed: the guest has no agent")


class _Arrival:
    """Tells, once the machine is ready and all of its overlay is here, how it went: whichever is last."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._here = False
        self._made: Synthesised | None = None

    def here(self) -> None:
        """All is here; called from the thread that delivered it."""
        with self._lock:
            self._here = True
            self._tell()

    def ready(self, made: Synthesised) -> None:
        """The machine is ready."""
        with self._lock:
            self._made = made
            self._tell()

    def _tell(self) -> None:
        paging = self._made.started.progress() if self._made and self._here else None
        if self._made and paging:
            seconds = self._made.timings.moments["arrived"]
            self._say(
                f"all {format_bytes(paging.bytes)} are here after {seconds:.2f} s; "
                f"the guest waited {paging.stalls} times for a page, at most {paging.longest_stall:.2f} s"
            )


class Ps(CloudletCommand, Lister):
    """List the machines that run here."""

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        site = self.app.site()
        rows = []
        for folder, record in records(site.settings.instances_dir):
            since = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            where = " ".join(f"{endpoint.url}" for endpoint in record.endpoints)
            state = "running" if record.machine and record.machine.alive() else "starting"
            paging = read_progress(folder)
            arrived = _percent(paging) if paging else "100 %"
            stalls = _stalls(paging) if paging else ""
            rows.append((record.id, record.name, state, where, arrived, stalls, record.base_id[:16], since))
        return ("id", "name", "state", "endpoints", "arrived", "stalls", "base", "since"), rows


class Stop(CloudletCommand):
    """End a machine that runs here."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "instances", nargs="+", metavar="INSTANCE", help="its id, or its name if only one has it"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        folder = self.app.site().settings.instances_dir
        for wanted in parsed_args.instances:
            running = records(folder)
            matching = [found for found in running if wanted in (found[1].id, found[1].name)]
            if len(matching) > 1:
                ids = ", ".join(path.name for path, _ in matching)
                raise ConflictError(f"{len(matching)} machines are called {wanted}", hint=f"name one: {ids}")
            if not matching:
                raise NotFoundError(f"no machine {wanted!r} runs here", hint="cloudlet ps")
            # Its owner sees it end and removes what is left.
            path, record = matching[0]
            deadline = time.monotonic() + 10.0
            while path.exists():
                for process in (*record.processes, *processes_of(path)):
                    process.kill()
                if time.monotonic() > deadline:
                    raise FailedError(
                        f"{wanted} is ended, but who started it does not remove it",
                        hint="end that command, then: cloudlet ps",
                    )
                time.sleep(0.02)
            self.app.say(f"{wanted} is ended")


def _published(text: str) -> PublishedPort:
    address, _, ports = text.rpartition(":")
    host, _, outside = address.rpartition(":")
    if not (ports.isdecimal() and outside.isdecimal() and 0 < int(ports) < 65536 and int(outside) < 65536):
        raise UsageError(f"--port {text}: write HOST:GUEST or ADDRESS:HOST:GUEST", hint="such as 8000:8080")
    return PublishedPort(int(ports), host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(outside))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _percent(paging: Paging) -> str:
    return f"{100 * paging.received // max(1, paging.bytes)} %"


def _stalls(paging: Paging) -> str:
    waits = ", waits now" if paging.waiting_since is not None else ""
    return f"{paging.stalls}, longest {paging.longest_stall:.2f} s{waits}"


def _what_ended(instance: Instance) -> str:
    try:
        alive = instance.state() is not RunState.GONE
    except FailedError:  # it is on its way out
        alive = False
    return "the machine's network" if alive else "the machine"


def _document(synthesised: Synthesised) -> dict[str, Any]:
    instance, root = synthesised.instance, synthesised.root
    return {
        "id": instance.id,
        "app": root.app.name,
        "version": root.app.version,
        "endpoint": instance.endpoints[0].url if instance.endpoints else None,
        "endpoints": [
            {"url": endpoint.url, "guest_port": endpoint.guest_port, "name": endpoint.name}
            for endpoint in instance.endpoints
        ],
        "base": root.base,
        "overlay": synthesised.overlay_id,
        "signed_by": synthesised.signed_by,
        "bytes": synthesised.overlay_bytes,
        "identity_renewed": synthesised.renewed,
        "start": "image" if synthesised.started.from_image else synthesised.started.choice.start.value,
        "start_because": synthesised.started.choice.why,
        "start_hint": synthesised.started.choice.hint,
        "paging": asdict(paging) if (paging := synthesised.started.progress()) else None,
        "seconds": synthesised.timings.moments,
    }
