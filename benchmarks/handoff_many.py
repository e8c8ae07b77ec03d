"""Many hand-offs at once over one wire: how fairly they share it, and what memory that takes at each site."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.handoff import PROMISED, counter
from benchmarks.handoff_sites import HTTP_PORT, Site, Sites, ask, mib, port_of, sites, url_of
from benchmarks.lab import Lab, say
from benchmarks.results import Results
from cloudlet.errors import FailedError
from cloudlet.hypervisor.records import records

AT_ONCE = 20
HELD_MIB = 2
"""What each holds besides, so that there is something to share."""
DEADLINE = 120.0
_SPARE_SECONDS = 120.0
_SAMPLE_SECONDS = 0.5


def many(lab: Lab, results: Results) -> None:
    """All of them asked for together, from the near site to the far one."""
    count = lab.times(AT_ONCE, 4)
    with sites(lab, counter()) as both, ExitStack() as stack:
        instances = []
        for number in range(count):
            say(f"starting instance {number + 1} of {count}")
            instances.append(stack.enter_context(both.instance()))
            ask(f"{url_of(instances[-1])}/alloc?mib={HELD_MIB}")
        held = [ask(f"{url_of(one)}/held") for one in instances]
        both.wire.rate(PROMISED)
        say(f"{count} hand-offs at once")
        carried = both.wire.carried()
        with _memory(both.near) as near, _memory(both.far) as far:
            operations = [_begin(both, one) for one in instances]
            ended = [both.near.operator.done(one, DEADLINE + _SPARE_SECONDS) for one in operations]
        results.add("handoff.many.bytes", both.wire.carried() - carried)
        for operation in ended:
            results.add("handoff.many.operation_s", _seconds(operation))
        for name, memory in (("near", near), ("far", far)):
            results.add(f"handoff.many.{name}_before_mib", memory[0])
            results.add(f"handoff.many.{name}_most_mib", max(memory))
        for one, before in zip(instances, held, strict=True):
            if ask(f"http://{both.far.address}:{port_of(one, HTTP_PORT)}/held") != before:
                raise FailedError(f"the application of instance {one['id']} holds something else")
        seconds = sorted(results.samples["handoff.many.operation_s"])
        say(
            f"  median {seconds[len(seconds) // 2]:.1f} s, slowest {seconds[-1]:.1f} s; MiB before and most: "
            f"near {near[0]:.0f}, {max(near):.0f}; far {far[0]:.0f}, {max(far):.0f}"
        )


def _begin(both: Sites, instance: dict[str, Any]) -> dict[str, Any]:
    operator = both.near.operator
    (peer,) = operator("GET", "/v1/peers")["peers"]
    wanted = {
        "instance_id": instance["id"], "peer_id": peer["id"], "overlay": "overlay",
        "deadline_seconds": DEADLINE,
    }  # fmt: skip
    return dict(operator("POST", "/v1/handoffs", {"handoff": wanted})["operation"])


def _seconds(operation: dict[str, Any]) -> float:
    """From the request to the operation's end."""
    began, ended = (datetime.fromisoformat(operation[name]) for name in ("created_at", "updated_at"))
    return (ended - began).total_seconds()


@contextmanager
def _memory(site: Site) -> Iterator[list[float]]:
    """What a site's own processes use, in MiB: before, and again and again until the context is left."""
    found = [_used(site)]
    ends = threading.Event()

    def sample() -> None:
        while not ends.wait(_SAMPLE_SECONDS):
            found.append(_used(site))

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()


def _used(site: Site) -> float:
    """PSS of the server, its nursery and all keepers; the machines are their guests'."""
    owners = [record.owner.pid for _, record in records(site.settings.instances_dir) if record.owner]
    pids = [site.served.pid, *site.served.children(), *owners]
    return mib(sum(_pss(pid) for pid in set(pids)))


def _pss(pid: int) -> int:
    """Bytes; a page that several have counts in parts. A process that has gone has none."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
