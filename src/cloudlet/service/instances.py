"""Instances: asked for, renewed, paused, saved, ended. What takes long is an operation (``flows.py``).

A call here decides, under the database's locks, whether something may be done in the present state, and
writes that it is being done, with the operation that does it, in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from cloudlet.errors import CloudletError, ConflictError, NotFoundError, UsageError
from cloudlet.keeper.order import Order
from cloudlet.model import PublishedPort
from cloudlet.overlay.root import Root
from cloudlet.service import capacity
from cloudlet.service.capacity import Usage
from cloudlet.service.underway import check_not_moving
from cloudlet.service.work import operation
from cloudlet.store import journal
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import (
    INSTANCES,
    OVERLAYS,
    App,
    FileState,
    Instance,
    InstanceState,
    Operation,
    Overlay,
    now,
)

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

_ASK_SECONDS = 10.0
"""Longest wait for a keeper that is to do what takes no time."""
_RUNNING = (InstanceState.ACTIVE, InstanceState.PAUSED)
_GO_ALONG = frozenset({"name", "metadata"})
"""What another site is told of an instance when that is offered to it."""


Aside = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Asked:
    """An instance that somebody asks for."""

    project_id: str
    user_id: str
    name: str = ""
    app: App | None = None
    overlay: Overlay | None = None
    url: str | None = None
    ports: Sequence[PublishedPort] = ()
    lease_seconds: int | None = None
    metadata: Mapping[str, str] | None = None
    request_id: str = ""


class Instances:
    """The instances of a site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site

    def create(
        self, asked: Asked, remember: Remember = forget, elsewhere: Aside = nullcontext
    ) -> tuple[Instance, Operation]:
        """Admit an instance, and have it made.

        :param elsewhere: a context for what waits for another server.
        :raises CapacityError: it does not fit.
        :raises ConflictError: its overlay is not whole.
        :raises IntegrityError: the overlay at the URL may not run here.
        """
        instance, overlay = self._planned(asked, elsewhere)
        wanted = Usage(1, instance.memory_bytes, instance.cpus, instance.disk_bytes)

        def admit(connection: Connection) -> Operation:
            capacity.admit(connection, self._site.options.limits, wanted)
            INSTANCES.insert(connection, instance)
            if overlay and overlay.digest:
                with suppress(NotFoundError):  # then it is fetched again
                    self._site.blobs.hold(connection, overlay.digest, f"instance:{instance.id}")
            journal.emit(connection, "instance", "requested", instance, name=instance.name)
            begun = self._begin(connection, "instance.create", instance, asked.request_id)
            remember(connection, begun.id)
            return begun

        begun = self._site.database.write(admit)
        self._site.work.submit(begun)
        return instance, begun

    def begin_lease(self, instance_id: str) -> None:
        """Let the lease of an instance that has become active begin, if it has one."""

        def begin(connection: Connection) -> None:
            instance = INSTANCES.get(connection, instance_id)
            if instance.lease_seconds and instance.expires_at is None:
                end = now() + timedelta(seconds=instance.lease_seconds)
                INSTANCES.update(connection, instance_id, expires_at=end)

        self._site.database.write(begin)
        self._site.leases.look()

    def renew(self, instance: Instance, seconds: int) -> Instance:
        """Have the lease end so many seconds from now; one that has ended a while ago begins again.

        :raises UsageError: it is longer than leases may be.
        :raises ConflictError: the instance has no lease to renew any more.
        """
        seconds = self._lease(seconds) or 0

        def renew(connection: Connection) -> tuple[Instance, bool]:
            before = INSTANCES.get(connection, instance.id, lock=True)
            check_here(before)
            check_not_moving(connection, before)
            states = (*_RUNNING, InstanceState.EXPIRED, InstanceState.REQUESTED, InstanceState.SYNTHESISING)
            expired = before.state is InstanceState.EXPIRED
            changes: dict[str, Any] = {"state": InstanceState.ACTIVE} if expired else {}
            started = before.expires_at is not None or before.state in _RUNNING
            end = now() + timedelta(seconds=seconds) if started else None
            after = INSTANCES.update(
                connection, instance.id, where={"state": states}, lease_seconds=seconds, expires_at=end,
                warned=False, **changes,
            )  # fmt: skip
            journal.emit(connection, "instance", "renewed", after, expires_at=_text(after))
            return after, expired

        with self._site.keeping.asking(instance.id):
            after, expired = self._site.database.write(renew)
            if expired:
                try:
                    self._site.keeping.keepers.ask(instance.id, "resume", timeout=_ASK_SECONDS)
                except CloudletError:
                    self._put_back(after, state=InstanceState.EXPIRED, expires_at=instance.expires_at)
                    raise
        self._site.leases.look()
        return after

    def describe(self, instance: Instance, **changes: Any) -> Instance:
        """Change an instance's name or metadata.

        :raises ConflictError: it is at another site, or on its way: what was changed would be lost there.
        """

        def change(connection: Connection) -> Instance:
            before = INSTANCES.get(connection, instance.id, lock=True)
            check_here(before)
            if changes.keys() & _GO_ALONG:
                check_not_moving(connection, before)
            return INSTANCES.update(connection, instance.id, **changes)

        return self._site.database.write(change)

    def pause(self, instance: Instance) -> Instance:
        """Stop the machine's CPUs."""
        return self._change(instance, InstanceState.ACTIVE, InstanceState.PAUSED, "paused", "pause")

    def resume(self, instance: Instance, *, even_draining: bool = False) -> Instance | Operation:
        """Let it run again: at once if it is paused, by an operation if it is suspended.

        :param even_draining: it comes back also to a site that is being emptied.
        :raises CapacityError: it does not fit any more, or the site admits none.
        """
        if instance.state is InstanceState.SUSPENDED:
            return self._resume_suspended(instance, even_draining)
        return self._change(instance, InstanceState.PAUSED, InstanceState.ACTIVE, "resumed", "resume")

    def suspend(self, instance: Instance, *, until_start: bool = False) -> Operation:
        """Write the machine to a file and end it.

        :param until_start: it is resumed when the site is started again after a shutdown of the machine.
        """

        def begin(connection: Connection) -> Operation:
            before = INSTANCES.get(connection, instance.id, lock=True)
            _check_runs(connection, before)
            paused = before.state is InstanceState.PAUSED
            # Who has paused an instance resumes it: it waits for that in a file instead of in memory.
            INSTANCES.update(connection, instance.id, resume_at_start=until_start and not paused)
            return self._begin(connection, "instance.suspend", instance, input_={"paused": paused})

        return self._submit(begin)

    def save(self, instance: Instance, overlay: Overlay, remember: Remember = forget) -> Operation:
        """Make an overlay of what the machine is now."""

        def begin(connection: Connection) -> Operation:
            _check_runs(connection, INSTANCES.get(connection, instance.id))
            OVERLAYS.insert(connection, overlay)
            journal.emit(connection, "overlay", "queued", overlay, name=overlay.name, saved_from=instance.id)
            begun = self._begin(connection, "instance.save", instance, overlay=overlay.id)
            remember(connection, begun.id)
            return begun

        return self._submit(begin)

    def delete(self, instance: Instance, only_if: Mapping[str, Any] | None = None) -> Operation:
        """End the machine and forget the instance; what is being done with it is cancelled.

        Who asks again is told of the same operation. Of an instance that has left for another site it is the
        row here that goes, and nobody is shown the way there any more.

        :param only_if: what its row has to say.
        :raises ConflictError: it does not.
        """

        def begin(connection: Connection) -> Operation:
            before = INSTANCES.get(connection, instance.id, lock=True)  # who deletes it too waits here
            check_not_moving(connection, before)
            for begun in self._site.work.open_on(connection, instance.id):
                if begun.kind == "instance.delete":
                    return begun
            deleting = {"state": InstanceState.DELETING, "endpoints": []}
            after = INSTANCES.update(connection, instance.id, where=only_if, **deleting)
            journal.emit(connection, "instance", "deleting", after)
            return self._begin(connection, "instance.delete", instance)

        begun = self._site.database.write(begin)
        self._site.work.cancel_others(instance.id, begun.id)
        self._site.work.submit(begun)
        return begun

    def restart(self, connection: Connection, instance: Instance) -> Operation:
        """Have an instance started again whose machine ended; submit the operation when it is committed."""
        return self._begin(connection, "instance.restart", instance)

    def console_log(self, instance: Instance, most: int) -> str:
        """The end of what the machine wrote to its serial console.

        :raises ConflictError: there is no machine.
        """
        check_here(instance)
        status = self._site.keeping.status(instance.id)
        try:
            if not status or not status.folder:
                raise FileNotFoundError
            with (Path(status.folder) / "console.log").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - most))
                return file.read().decode(errors="replace")
        except FileNotFoundError as error:
            raise ConflictError(
                f"instance {instance.id} has no console", hint="wait until it is active"
            ) from error

    def suspended_file(self, instance_id: str) -> Path:
        """Where a suspended machine is."""
        return self._site.options.machine.state_dir / "suspended" / instance_id

    def _planned(self, asked: Asked, elsewhere: Aside) -> tuple[Instance, Overlay | None]:
        overlay, url = asked.overlay, asked.url
        if asked.app:
            overlay = self._overlay_of(asked.app)
        if overlay:
            if overlay.state is not FileState.ACTIVE and not overlay.url:
                raise ConflictError(f"overlay {overlay.id} is {overlay.state}", hint="upload its bytes first")
            with elsewhere() if overlay.url else nullcontext():
                root = self._site.overlays.root(overlay)
        elif url:
            with elsewhere():
                root = self._site.overlays.peek(url)[0]
        else:
            raise UsageError("an instance needs app_id, overlay_id or url")
        self._check_base(root)
        descriptor = asked.app.descriptor if asked.app else {}
        (component,) = descriptor.get("components", ({},))
        open_ports = component.get("ports")
        ports = _published(root, open_ports, asked.ports, self._site.options.publish_address)
        return Instance(
            project_id=asked.project_id,
            user_id=asked.user_id,
            name=asked.name or (asked.app or asked.overlay or root.app).name,
            app_id=asked.app.id if asked.app else None,
            overlay_id=overlay.id if overlay else None,
            base_identity=root.base,
            memory_bytes=root.machine.memory_bytes,
            disk_bytes=root.machine.disk_bytes,
            cpus=root.machine.cpus,
            order=Order(
                source=url or "",
                ports=ports,
                only_these=open_ports is not None,
                ready=component.get("readiness") or "",
            ).to_json(),
            lease_seconds=self._lease(asked.lease_seconds),
            metadata=dict(asked.metadata or {}),
            restart=bool(descriptor.get("restart", False)),
        ), overlay

    def _overlay_of(self, app: App) -> Overlay:
        (component,) = app.descriptor["components"]
        return self._site.database.read(lambda connection: OVERLAYS.get(connection, component["overlay_id"]))

    def _check_base(self, root: Root) -> None:
        try:
            base = self._site.machine.bases.get(root.base)
        except NotFoundError as error:
            raise NotFoundError(
                f"base {root.base[:16]} of this overlay is not here",
                hint="cloudlet base list shows those that are",
            ) from error
        self._site.machine.hypervisor.check(root.machine)
        root.check_base(base.id, base.machine, base.description.sections)

    def _lease(self, seconds: int | None) -> int | None:
        leases = self._site.options.leases
        wanted = leases.default if seconds is None else seconds
        if leases.most and (not wanted or wanted > leases.most):
            if seconds is None:
                return leases.most
            raise UsageError(f"lease_seconds: the longest lease here is {leases.most} s")
        return wanted or None

    def _resume_suspended(self, instance: Instance, even_draining: bool) -> Operation:
        wanted = Usage(1, instance.memory_bytes, instance.cpus, instance.disk_bytes)

        def begin(connection: Connection) -> Operation:
            limits = self._site.options.limits
            capacity.admit(connection, limits, wanted, even_draining=even_draining)
            suspended = {"state": InstanceState.SUSPENDED}
            coming = {"state": InstanceState.SYNTHESISING, "resume_at_start": False}
            INSTANCES.update(connection, instance.id, where=suspended, **coming)
            return self._begin(connection, "instance.resume", instance)

        return self._submit(begin)

    def _change(
        self, instance: Instance, before: InstanceState, state: InstanceState, event: str, ask: str
    ) -> Instance:
        """Change the state, and have the keeper do it; if it cannot, the state is as before."""

        def change(connection: Connection) -> Instance:
            row = INSTANCES.get(connection, instance.id, lock=True)
            check_here(row)
            check_not_moving(connection, row)
            after = INSTANCES.update(connection, instance.id, where={"state": before}, state=state)
            journal.emit(connection, "instance", event, after)
            return after

        with self._site.keeping.asking(instance.id):
            after = self._site.database.write(change)
            try:
                self._site.keeping.keepers.ask(instance.id, ask, timeout=_ASK_SECONDS)
            except CloudletError:
                self._put_back(after, state=before)
                raise
        return after

    def _put_back(self, after: Instance, **before: Any) -> None:
        """Have a row say again what it said, since its keeper could not follow."""
        with suppress(CloudletError):
            self._site.database.write(
                lambda connection: INSTANCES.update(
                    connection, after.id, where={"state": after.state}, **before
                )
            )

    def _begin(
        self,
        connection: Connection,
        kind: str,
        instance: Instance,
        request_id: str = "",
        input_: Mapping[str, Any] | None = None,
        **more: str,
    ) -> Operation:
        begun = operation(kind, instance, {"instance": instance.id, **more}, **(input_ or {}))
        return self._site.work.add(connection, replace(begun, request_id=request_id))

    def _submit(self, begin: Any) -> Operation:
        begun: Operation = self._site.database.write(begin)
        self._site.work.submit(begun)
        return begun


def check_here(instance: Instance) -> None:
    """Refuse what cannot be done here with an instance that has left, and say where it is.

    :raises ConflictError: it has.
    """
    if instance.state is InstanceState.MOVED:
        there = instance.moved_to or {}
        place = there.get("url") or f"the cloudlet {there.get('cloudlet_id')}"
        raise ConflictError(f"instance {instance.id} is moved: it is at {place}", hint="ask for it there")


def _check_runs(connection: Connection, instance: Instance) -> None:
    check_here(instance)
    check_not_moving(connection, instance)
    if instance.state not in _RUNNING:
        raise ConflictError(f"instance {instance.id} is {instance.state}", hint="wait until it is active")


def _published(
    root: Root, open_ports: Sequence[Mapping[str, Any]] | None, asked: Sequence[PublishedPort], address: str
) -> tuple[PublishedPort, ...]:
    """The app's ports on the site's address; the user may choose the host's numbers.

    :param open_ports: those that the app publishes; None for all of its overlay.
    """
    names = {port.port: port.name for port in root.app.ports}
    if open_ports is not None:
        names = {port["port"]: port["name"] or names.get(port["port"], "") for port in open_ports}
    chosen = {port.guest_port: port.host_port for port in asked}
    if unknown := chosen.keys() - names.keys():
        raise UsageError(f"ports: the app has no port {sorted(unknown)[0]}")
    return tuple(PublishedPort(port, address, chosen.get(port, 0), name) for port, name in names.items())


def _text(instance: Instance) -> str | None:
    return instance.expires_at.isoformat() if instance.expires_at else None
