"""The steps of every kind of operation. A kind is a line of the table at the end; a step is a class.

What a step needs it reads from the rows, and what it did it writes there: so it can be done again by another
process. What must be undone is told by the rows too.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError, ConflictError, NotFoundError
from cloudlet.keeper.order import KeeperState, Order, Status, describe, raised
from cloudlet.service import overlays
from cloudlet.service.emptying import DRAIN_FLOWS
from cloudlet.service.keeping import endpoints_of
from cloudlet.service.moving import HANDOFF_FLOWS
from cloudlet.service.steps import Flow, Lane, Running, Step
from cloudlet.store import journal
from cloudlet.store.rows import INSTANCES, OVERLAYS, FileState, Instance, InstanceState

_READY_SECONDS = 3600.0
"""Longest time for an instance to be ready, its download included: the keeper has shorter ones of its own."""
_SAVE_SECONDS = 600.0


class _OfInstance(Step):
    """A step that works on an instance."""

    @property
    def instance_id(self) -> str:
        return self.operation.resources["instance"]

    def instance(self) -> Instance:
        return self.site.database.read(lambda connection: INSTANCES.get(connection, self.instance_id))

    def become(self, state: InstanceState, event: str | None = None, **changes: Any) -> None:
        """Change the instance's state, with an event unless it is in that state already."""

        def note(connection: Connection) -> None:
            before = INSTANCES.get(connection, self.instance_id, lock=True)
            if before.state is InstanceState.DELETING:
                return  # nothing else becomes of it any more
            after = INSTANCES.update(connection, self.instance_id, state=state, **changes)
            if event and before.state != state:
                journal.emit(
                    connection, "instance", event, after, state=state, endpoints=list(after.endpoints)
                )

        self.site.database.write(note)


class Start(_OfInstance):
    """Have a keeper for the instance."""

    step = "start"

    def do(self) -> None:
        instance = self.instance()
        order = Order.from_json(instance.order)
        if instance.overlay_id:
            order = self.site.overlays.order(instance.overlay_id, order)
        self.site.keeping.start(self.instance_id, order)

    def undo(self) -> None:
        self.site.keeping.end(self.instance_id)


class Synthesise(_OfInstance):
    """Wait until its machine runs and answers, and say where."""

    step = "synthesise"

    def do(self) -> None:
        self.become(InstanceState.SYNTHESISING)
        status = self.site.keeping.wait(self.instance_id, _settled, _READY_SECONDS, self._look)
        if status.state is KeeperState.ENDED:
            raise raised(status.error or {"message": "the machine ended before it was ready"})
        self.become(
            InstanceState.ACTIVE, "active",
            endpoints=endpoints_of(status), timings=dict(status.timings), error=None,
        )  # fmt: skip
        self.site.meters.synthesised(status.timings)
        self.site.instances.begin_lease(self.instance_id)
        # It may have ended since it said that it is ready, when nobody took it for one that runs.
        self.site.keeping.look_again(self.instance_id)

    def _look(self, status: Status | None) -> None:
        self.running.check()
        if status and status.total:
            self.running.progress(status.received, status.total)


class Stop(_OfInstance):
    """End its machine."""

    step = "stop"

    def do(self) -> None:
        self.site.keeping.end(self.instance_id)


class Forget(_OfInstance):
    """Remove its row, and what belongs to it alone."""

    step = "forget"

    def do(self) -> None:
        self.site.instances.suspended_file(self.instance_id).unlink(missing_ok=True)

        def remove(connection: Connection) -> None:
            try:
                instance = INSTANCES.get(connection, self.instance_id, lock=True)
            except NotFoundError:
                return
            INSTANCES.delete(connection, instance.id)
            elsewhere = {"moved_to": instance.moved_to} if instance.moved_to else {}
            journal.emit(connection, "instance", "deleted", instance, **elsewhere)

        self.site.database.write(remove)
        self.site.blobs.release(f"instance:{self.instance_id}")


class Save(_OfInstance):
    """Write the machine as an overlay to a file; it pauses for a moment."""

    step = "save"

    def do(self) -> None:
        target = self._target()
        if not target.exists():  # else it was saved before a crash
            self._save(target, stay=False)

    def undo(self) -> None:
        self._target().unlink(missing_ok=True)

    @property
    def was_paused(self) -> bool:
        return bool(self.operation.input.get("paused"))

    def _target(self) -> Path:
        return self.site.blobs.staging(f"save-{self.operation.id}")

    def _save(self, target: Path, *, stay: bool) -> None:
        self.site.keeping.keepers.ask(
            self.instance_id, "save", output=str(target), stay=stay, timeout=_SAVE_SECONDS,
            progress=lambda done, total: self.running.progress(done * 4096, total * 4096),
        )  # fmt: skip


class Keep(Step):
    """Make the saved file an overlay of the site."""

    step = "keep"

    def do(self) -> None:
        overlay_id = self.operation.resources["overlay"]
        file = self.site.blobs.staging(f"save-{self.operation.id}")
        self.site.overlays.finish(overlay_id, file, self.running.progress)


class Suspend(Save):
    """Write the machine to a file of the site; it stays paused."""

    step = "suspend"

    def do(self) -> None:
        if self.instance().state is InstanceState.SUSPENDED:
            return  # by an operation before this one
        if not (target := self._target()).exists():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._save(target, stay=True)

    def undo(self) -> None:
        """Let it run again. The file is all there is of a machine that has ended, and stays."""
        if self.instance().state is InstanceState.SUSPENDED or not self.site.keeping.keepers.lives(
            self.instance_id
        ):
            return
        if not self.was_paused:
            self.site.keeping.keepers.ask(self.instance_id, "resume")
        super().undo()

    def _target(self) -> Path:
        return self.site.instances.suspended_file(self.instance_id)


class Suspended(Stop):
    """End the machine; its file is what is left of it. From here on there is no way back."""

    step = "stop"

    def do(self) -> None:
        self.become(InstanceState.SUSPENDED, "suspended", endpoints=[], expires_at=None, warned=False)
        super().do()


class Resume(Start):
    """Have a keeper for the instance again, from the file that was written when it was suspended."""

    step = "start"

    def do(self) -> None:
        instance = self.instance()
        file = self.site.instances.suspended_file(self.instance_id)
        order = Order.from_json({**instance.order, "source": str(file), "use_image": False})
        self.site.keeping.start(self.instance_id, order)


class Resumed(Synthesise):
    """Wait until it runs, and drop the file."""

    step = "synthesise"

    def do(self) -> None:
        super().do()
        self.site.instances.suspended_file(self.instance_id).unlink(missing_ok=True)


class Fetch(Step):
    """Bring an overlay here from its URL, verify it, and keep it as long as there is room."""

    step = "fetch"

    def do(self) -> None:
        overlay_id = self.operation.resources["overlay"]
        overlay = self.site.database.read(lambda connection: OVERLAYS.get(connection, overlay_id))
        file = self.site.blobs.staging(f"fetch-{overlay_id}")
        if overlay.digest and self.site.blobs.path(overlay.digest):
            if overlay.state is not FileState.ACTIVE:  # by a process that was killed before it could say so
                file.unlink(missing_ok=True)
                self.site.overlays.finish(overlay_id, file)
            return
        assert overlay.url
        overlays.download(overlay.url, file, self.site.options.fetch_networks, self.running.progress)
        self.site.overlays.finish(overlay_id, file, self.running.progress)

    def undo(self) -> None:
        self.site.blobs.staging(f"fetch-{self.operation.resources['overlay']}").unlink(missing_ok=True)


class FetchBase(Step):
    """Bring the file of a base here from its URL."""

    step = "fetch"

    def do(self) -> None:
        base_id, bases = self.operation.resources["base"], self.site.bases
        if not bases.staged(base_id).exists():  # else it was fetched before a crash
            part = self._part()
            overlays.download(
                self.operation.input["url"], part, self.site.options.fetch_networks, self.running.progress,
                lambda size: bases.reserve(base_id, size),
            )  # fmt: skip
            part.replace(bases.staged(base_id))

    def undo(self) -> None:
        for file in (self._part(), self.site.bases.staged(self.operation.resources["base"])):
            file.unlink(missing_ok=True)

    def _part(self) -> Path:
        return self.site.blobs.staging(f"fetch-{self.operation.resources['base']}")


class ImportBase(Step):
    """Unpack the file of a base, every part of it compared with its digest."""

    step = "import"

    def do(self) -> None:
        named = self.operation.input.get("named", True)
        self.site.bases.unpack(self.operation.resources["base"], self.running.progress, named=named)


def _instance_failed(running: Running, error: CloudletError) -> None:
    """An instance that did not come to be, or not again."""

    def note(connection: Connection) -> None:
        with suppress(NotFoundError):  # it was deleted meanwhile
            before = INSTANCES.get(connection, running.instance_id, lock=True)
            if before.state in (InstanceState.DELETING, InstanceState.FAILED):
                return
            failed: dict[str, Any] = {"state": InstanceState.FAILED, "error": describe(error)}
            after = INSTANCES.update(connection, before.id, endpoints=[], **failed)
            journal.emit(connection, "instance", "failed", after, error=after.error)

    running.site.database.write(note)


def _still_suspended(running: Running, error: CloudletError) -> None:
    """An instance that could not be resumed: its file is still there."""

    def note(connection: Connection) -> None:
        with suppress(NotFoundError, ConflictError):
            changes: dict[str, Any] = {
                "state": InstanceState.SUSPENDED,
                "endpoints": [],
                "error": describe(error),
            }
            changed = (InstanceState.SYNTHESISING, InstanceState.ACTIVE)
            where = {"state": changed}
            after = INSTANCES.update(connection, running.instance_id, where=where, **changes)
            journal.emit(connection, "instance", "suspended", after, error=after.error)

    running.site.database.write(note)


def _overlay_rejected(running: Running, error: CloudletError) -> None:
    running.site.overlays.reject(running.operation.resources["overlay"], error)


def _not_fetched(running: Running, error: CloudletError) -> None:
    running.site.overlays.not_fetched(running.operation.resources["overlay"], error)


def _base_rejected(running: Running, error: CloudletError) -> None:
    running.site.bases.reject(running.operation.resources["base"], error)


FLOWS: dict[str, Flow] = {
    "instance.create": Flow((Start, Synthesise), _instance_failed),
    "instance.restart": Flow((Start, Synthesise), _instance_failed),
    "instance.delete": Flow((Stop, Forget), can_be_cancelled=False, lane=Lane.URGENT),
    "instance.save": Flow((Save, Keep), _overlay_rejected),
    "instance.suspend": Flow((Suspend, Suspended)),
    "instance.resume": Flow((Resume, Resumed), _still_suspended),
    "base.import": Flow((ImportBase,), _base_rejected),
    "base.fetch": Flow((FetchBase, ImportBase), _base_rejected),
    **HANDOFF_FLOWS,
    **DRAIN_FLOWS,
    "app.prestage": Flow((Fetch,), _not_fetched),
}


def _settled(status: Status) -> bool:
    return status.state is not KeeperState.STARTING
