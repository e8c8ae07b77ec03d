"""The life of a keeper: take the folder, make the machine, tell how it is, end it when told to.

Whatever ends it, nothing of the machine is left: a machine without its keeper would be nobody's. If it is
killed, the next look at the site's folders ends the machine.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cloudlet.control.save import save
from cloudlet.control.site import Site
from cloudlet.control.synthesis import Request, Synthesised, synthesise
from cloudlet.errors import ConflictError, FailedError
from cloudlet.hypervisor.driver import Instance, RunState
from cloudlet.keeper.arriving import Arriving
from cloudlet.keeper.control import Command, Control, Progress, describe_any
from cloudlet.keeper.folder import ORDER, take
from cloudlet.keeper.leaving import Leaving
from cloudlet.keeper.order import KeeperState, Order, describe
from cloudlet.model import Readiness
from cloudlet.settings import Settings
from cloudlet.transfer.networks import Networks
from cloudlet.transfer.source import open_source

_ARRIVED_SECONDS = 10.0
_TOLD_SECONDS = 0.25
"""Between two words about bytes that arrive."""


class _ToldToEnd(BaseException):
    """Raised in the main thread by SIGTERM."""


class Keeper:
    """One keeper."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._made: Synthesised | None = None
        self._site: Site | None = None
        self._told = threading.Event()
        self._asked = False
        """Whether it is the site that wants the end."""
        self._last_told = 0.0
        commands = {"pause": self._pause, "resume": self._resume, "save": self._save}
        beside = {
            "end": self._end,
            "describe": self._describe,
            "depart": self._depart,
            "stay": self._stay,
            "keep": self._stay_after_all,
            "resume_as_of_switch": self._resume_as_of_switch,
            "give_up": self._give_up,
            "find": self._find,
            **{name: self._arriving(name) for name in ("records", "commit", "drop", "take", "wanted")},
        }
        self._lives = threading.Event()
        """Set as soon as there is a machine that runs."""
        self._leaving: Leaving | None = None
        self._arrival: Arriving | None = None
        self._control = Control(folder, commands, beside)

    def run(self, order: Order) -> None:
        """Keep the machine of ``order`` until it ends or is told to."""
        tell = self._control.tell
        try:
            self._keep(order)
        except _ToldToEnd:
            if not self._asked:
                tell(keep=False, error=describe(FailedError("its keeper was told to end by the system")))
        except Exception as error:
            tell(keep=False, error=describe_any(error))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Site.abandon(self._settings)
            tell(state=KeeperState.ENDED, endpoints=())

    def told_to_end(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """SIGTERM's handler: once, and not again while things are being cleaned up."""
        if not self._told.is_set():
            self._told.set()
            raise _ToldToEnd

    def _keep(self, order: Order) -> None:
        self._site = site = Site.open(self._settings)
        if order.arrival:
            self._arrival = arriving = Arriving(self._folder, site, self._control)
            with arriving.machine(order) as made:
                self._live(made, order)
        else:
            self._synthesise(site, order)
        self._forward()

    def _synthesise(self, site: Site, order: Order) -> None:
        request = Request(
            ports=order.ports,
            allow_unsigned=order.allow_unsigned,
            use_image=order.use_image,
            patience=order.patience,
            only_these=order.only_these,
            ready=Readiness.parse(order.ready) if order.ready else None,
        )
        networks = Networks(self._settings.fetch_networks)
        with (
            open_source(order.source, io.BytesIO(), patience=order.patience, networks=networks) as source,
            synthesise(
                site,
                source,
                request,
                progress=self._received,
                answering=self._answering,
                arrived=self._arrived,
            ) as made,
        ):
            self._live(made, order)

    def _live(self, made: Synthesised, order: Order) -> None:
        """Keep a machine that runs, until it is another site's."""
        assert self._site
        self._made = made
        self._leaving = Leaving(self._folder, self._site, made, self._control, order)
        self._lives.set()
        self._ready(made)
        made.instance.wait()
        if not self._leaving.gone_for_good():
            # Its console and log go with it: what they say of its end is all there will be.
            raise FailedError(f"the machine ended by itself: {_last_words(made.instance)}")

    def _forward(self) -> None:
        """Show those who connect the way to where the machine is now, for a while."""
        assert self._leaving
        self._made = None
        self._control.tell(state=KeeperState.MOVED)
        try:
            time.sleep(self._leaving.grace)
        finally:
            self._leaving.close()

    def _received(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_told > _TOLD_SECONDS:
            self._last_told = now
            self._control.tell(keep=False, received=done, total=total)

    def _answering(self, instance: Instance) -> None:
        self._control.tell(state=KeeperState.ANSWERING, **_place(instance))

    def _ready(self, made: Synthesised) -> None:
        started = made.started
        self._control.tell(
            state=KeeperState.READY,
            timings=dict(made.timings.moments),
            total=made.overlay_bytes,
            start="image" if started.from_image else started.choice.start.value,
            renewed=made.renewed,
            **_place(made.instance),
        )

    def _arrived(self) -> None:
        if made := self._made:
            whole = made.overlay_bytes
            self._control.tell(timings=dict(made.timings.moments), received=whole, total=whole)

    def _machine(self) -> Synthesised:
        self._wait_arrived()
        if self._made is None:
            raise ConflictError("the machine is not here", hint="wait until it is active")
        if self._leaving and self._leaving.busy:
            raise ConflictError("the instance is being handed off", hint="wait for that, or cancel it")
        return self._made

    def _wait_arrived(self) -> None:
        """Wait the moment from when a machine that came from elsewhere runs until it is this keeper's."""
        if self._arrival and self._arrival.runs:
            self._lives.wait(_ARRIVED_SECONDS)

    def _check_whole(self) -> None:
        """That the machine can be handed on.

        :raises ConflictError: some of its memory is still at another site.
        """
        if self._arrival and self._arrival.filling:
            raise ConflictError(
                "some of the instance's memory is still to come", hint="wait until it is here"
            )

    def _depart(self, message: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Hand the machine off; who asks again is told the same."""
        self._wait_arrived()
        if not self._leaving:
            raise ConflictError("the machine is not here", hint="wait until it is active")
        self._check_whole()
        return self._leaving.depart(message, progress)

    def _stay(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        if self._leaving and self._leaving.is_about(str(message.get("handoff"))):
            self._departing(message).stay()
        return {}

    def _stay_after_all(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        self._departing(message).keep()
        return {}

    def _resume_as_of_switch(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        self._departing(message).resume_as_of_switch()
        return {}

    def _give_up(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        self._departing(message).give_up()
        return {}

    def _find(self, message: Mapping[str, Any], _: Progress) -> dict[str, Any]:
        """The other site of a hand-off is somewhere else."""
        if self._arrival and self._arrival.is_about(str(message.get("handoff"))):
            self._arrival.find(message["peer"])
        else:
            self._departing(message)
        return {}

    def _departing(self, message: Mapping[str, Any]) -> Leaving:
        if not self._leaving or not self._leaving.is_about(str(message.get("handoff"))):
            raise ConflictError("the instance is not in this hand-off")
        if "peer" in message:
            self._leaving.find(message["peer"])
        return self._leaving

    def _describe(self, _: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        """What another site has to know of the machine, to have it."""
        self._machine()
        self._check_whole()
        assert self._leaving
        return self._leaving.describe()

    def _arriving(self, name: str) -> Command:
        def do(message: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
            if not self._arrival:
                raise ConflictError("no machine comes here from another site")
            command: Command = getattr(self._arrival, name)
            return command(message, progress)

        return do

    def _pause(self, _: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        self._machine().instance.pause()
        self._control.tell(paused=True)
        return {}

    def _resume(self, _: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        self._machine().instance.resume()
        self._control.tell(paused=False)
        return {}

    def _save(self, message: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Save the machine as an overlay to the file ``output``; with ``stay`` it does not run on."""
        made = self._machine()
        assert self._site
        stay = bool(message.get("stay"))
        try:
            saved = save(
                self._site, made, Path(str(message["output"])), paused=self._control.status.paused or stay,
                quiet=not (stay or self._control.status.paused), progress=progress,
            )  # fmt: skip
        finally:
            self._control.tell(paused=made.instance.state() is RunState.PAUSED)
        return {"pause_seconds": saved.pause_seconds}

    def _end(self, _: Mapping[str, Any], __: Progress) -> dict[str, Any]:
        self._asked = True
        os.kill(os.getpid(), signal.SIGTERM)
        return {}


def _place(instance: Instance) -> dict[str, Any]:
    return {"machine": instance.id, "folder": str(instance.directory), "endpoints": instance.endpoints}


def _last_words(instance: Instance) -> str:
    for name in ("machine.log", "qemu.log"):
        with suppress(OSError):
            if lines := (instance.directory / name).read_text(errors="replace").strip().splitlines():
                return lines[-1][-300:]
    return "it left no word"


def main(settings: Settings, folder: Path) -> int:
    """The whole life of a process that was forked to be the keeper of ``folder``."""
    try:
        lock = take(folder)
    except OSError as error:
        # Another keeper is there already: who asked for this one did not know of it.
        return 0 if error.errno == errno.EWOULDBLOCK else 1
    log = os.open(folder / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    order = Order.from_json(json.loads((folder / ORDER).read_text()))
    keeper = Keeper(settings, folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, keeper.told_to_end)
    keeper.run(order)
    sys.stdout.flush()
    os.close(lock)
    return 0
