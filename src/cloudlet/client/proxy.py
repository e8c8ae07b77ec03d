"""What can be done with a site: for each noun the verbs create, get, find, list, delete, and its own.

A verb that begins long work returns its :class:`~cloudlet.client.resources.Operation`;
:meth:`Proxy.wait_for_operation` waits for its end, and raises what made it fail. ``find`` takes a name or an
id. Every verb raises what the site refuses as an error of :mod:`cloudlet.errors`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from cloudlet.client import faults
from cloudlet.client.asking import id_of, retry_headers
from cloudlet.client.publishing import Publishing
from cloudlet.client.resources import Cloudlet, Event, Instance, Operation
from cloudlet.errors import FailedError

Told = Callable[[Operation], None]

_LONG_POLL = 30.0
_LOOK_SECONDS = 1.0
"""Between two looks at an operation whose progress is shown to somebody."""
_FEW = 1000
"""Events that are asked for at a time."""


class Proxy(Publishing):
    """A site, as its clients use it. Leave it as a context, or close it, when it is not needed any more."""

    def get_cloudlet(self) -> Cloudlet:
        """The site itself: what it is, what it may give, what it has given."""
        return self._get(Cloudlet, "self")

    def update_cloudlet(self, **changes: Any) -> Cloudlet:
        """Change the site, as its operator.

        :param changes: ``state``: ``draining``, so that it admits no new instance, or ``up`` again.
        """
        answer = self.patch("/cloudlets/self", json={"cloudlet": changes})
        return Cloudlet.existing(connection=self._connection, **answer.json()["cloudlet"])

    def instances(self, **query: Any) -> Iterator[Instance]:
        """All instances with these values."""
        return self._listed(Instance, query)

    def get_instance(self, instance: str | Instance) -> Instance:
        return self._get(Instance, instance)

    def find_instance(self, name_or_id: str) -> Instance:
        return self._named(Instance, name_or_id)

    def create_instance(self, *, retry_key: str | None = None, **attributes: Any) -> Operation:
        """Start something; ``resources["instance"]`` of the operation is the instance's id.

        :param attributes: exactly one of ``app_id``, ``overlay_id`` and ``url``; ``name``, ``ports``,
            ``lease_seconds``, ``metadata``.
        :raises CapacityError: it does not fit.
        """
        return self._begun(
            self.post("/instances", json={"instance": attributes}, headers=retry_headers(retry_key))
        )

    def wait_for_instance(self, operation: Operation, told: Told | None = None) -> Instance:
        """Wait until an instance answers that an operation makes; the instance, which says where."""
        return self.get_instance(self.wait_for_operation(operation, told=told).resources["instance"])

    def update_instance(self, instance: str | Instance, **changes: Any) -> Instance:
        """Change the name or the metadata of an instance."""
        return self._changed(Instance, id_of(instance), changes)

    def renew_instance(self, instance: str | Instance, seconds: int) -> Instance:
        """Have its lease end so many seconds from now."""
        return self._changed(Instance, id_of(instance), {"lease_seconds": seconds})

    def delete_instance(self, instance: str | Instance) -> Operation:
        """End an instance; what is being done with it is cancelled."""
        return self._begun(self.delete(f"/instances/{id_of(instance)}"))

    def pause_instance(self, instance: str | Instance) -> Instance:
        """Stop its CPUs; its memory stays where it is."""
        answer = self.post(f"/instances/{id_of(instance)}/pause")
        return Instance.existing(connection=self._connection, **answer.json()["instance"])

    def resume_instance(self, instance: str | Instance) -> Instance | Operation:
        """Let it go on: at once where it was paused, by an operation where it was suspended."""
        answer = self.post(f"/instances/{id_of(instance)}/resume")
        if answer.status_code == 202:
            return self._begun(answer)
        return Instance.existing(connection=self._connection, **answer.json()["instance"])

    def suspend_instance(self, instance: str | Instance) -> Operation:
        """Write it to the site's disk, and free its memory."""
        return self._begun(self.post(f"/instances/{id_of(instance)}/suspend"))

    def save_instance(
        self, instance: str | Instance, name: str, *, retry_key: str | None = None
    ) -> Operation:
        """Make an overlay of what its user changed; ``resources["overlay"]`` of the operation is its id."""
        body, headers = {"overlay": {"name": name}}, retry_headers(retry_key)
        return self._begun(self.post(f"/instances/{id_of(instance)}/overlay", json=body, headers=headers))

    def console_log(self, instance: str | Instance, length: int | None = None) -> str:
        """The end of what it wrote to its serial console.

        :param length: bytes at most.
        """
        query = {} if length is None else {"length": length}
        return self.get(f"/instances/{id_of(instance)}/console-log", params=query).text

    def operations(self, **query: Any) -> Iterator[Operation]:
        """All operations with these values."""
        return self._listed(Operation, query)

    def get_operation(self, operation: str | Operation, *, wait: float = 0) -> Operation:
        """An operation, at once, or as soon as it has ended but after ``wait`` seconds at the latest."""
        answer = self.get(f"/operations/{id_of(operation)}", params={"wait": wait} if wait else {})
        return self._begun(answer)

    def cancel_operation(self, operation: str | Operation) -> Operation:
        """Have an operation end, and what it did undone.

        :raises ConflictError: it has ended.
        """
        return self._begun(self.delete(f"/operations/{id_of(operation)}"))

    def wait_for_operation(
        self, operation: str | Operation, *, timeout: float | None = None, told: Told | None = None
    ) -> Operation:
        """Wait until an operation has succeeded.

        :param timeout: seconds; without, as long as it takes: an operation ends by itself.
        :param told: called about every second with how far it is.
        :raises CloudletError: it failed or was cancelled, or it has not ended in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        longest = _LOOK_SECONDS if told else _LONG_POLL
        while True:
            left = longest if deadline is None else deadline - time.monotonic()
            found = self.get_operation(operation, wait=max(0.0, min(left, longest)))
            if told:
                told(found)
            if found.ended:
                return _succeeded(found)
            if left <= 0:
                raise FailedError(f"operation {found.id} is still {found.state}", hint="wait for it again")

    def events(self, after: int | None = None, *, follow: bool = False, **query: Any) -> Iterator[Event]:
        """What happened after an event's number; without one, from now on.

        Numbers have no gaps: who was cut off goes on with the last number seen, and has missed nothing.

        :param follow: wait for more, without end.
        :param query: ``kind`` (kinds that begin so), ``resource_id``.
        """
        while True:
            wanted = {"after": after, "wait": _LONG_POLL if follow else 0, "limit": _FEW, **query}
            given = {name: value for name, value in wanted.items() if value is not None}
            page = self.get("/events", params=given).json()
            for event in page["events"]:
                yield Event.existing(connection=self._connection, **event)
            if not follow and (after is None or page["last"] <= after):
                return
            after = page["last"]


def _succeeded(operation: Operation) -> Operation:
    if operation.state == "failed":
        error = operation.error or {}
        raise faults.coded(error.get("code", ""), error.get("detail", f"operation {operation.id} failed"))
    if operation.state == "cancelled":
        raise FailedError(f"operation {operation.id} was cancelled")
    return operation
