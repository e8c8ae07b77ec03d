"""Two served sites whose guests are at bridges that are one network, in network namespaces.

::

    client          site a                        site b
    10.0.2.77 ----- bridge ~~~~ VXLAN tunnel ~~~~ bridge
                      |   198.18.0.1 -- 198.18.0.2  |        100 Mbit/s
                    guest (10.0.2.15) <- hand-off -> guest

A user in the namespace ``client`` holds one connection to the guest, wherever that is, and is a neighbour of
the first site only. What goes between the sites, or through the tunnel, is as slow as the link. All this
takes root.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cloudlet.client.unix import UnixAdapter
from cloudlet.control.site import Site
from cloudlet.hypervisor.qemu.instance import DISK
from cloudlet.hypervisor.records import records
from tests.qemu import guest
from tests.service.conftest import Caller, Made, end_machines
from tests.service.served import Served, serve_command, settings_file
from tests.service.two_sites import PeerSite, add_peer

BRIDGE = "guests"
GUEST = "10.0.2.15"
WEB, COUNTER = 8080, 7777
ASK_SECONDS = 0.02
ANSWER_SECONDS = 60.0
_CLIENT = "10.0.2.77/24"
_BACKHAUL = ("198.18.0.1", "198.18.0.2")
_RATE = "rate 100mbit burst 64kb latency 50ms"
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")

_BEGIN = f"""
cat > /run/count <<'END'
count=0
while read -r line; do count=$((count + 1)); echo "$count $line"; done
END
nc -ll -p {COUNTER} -e sh /run/count < /dev/null > /dev/null 2>&1 &
until netstat -ltn | grep -q :{COUNTER}; do usleep 20000; done
(
  while ! test -e /run/stop; do
    turn=$((turn + 1)); echo $turn >> /root/written
    dd if=/dev/urandom of=/run/busy bs=16k count=4 seek=$((turn % 16 * 4)) conv=notrunc
    test $((turn % 8)) = 0 && sync
    usleep 50000
  done
  touch /run/stopped
) < /dev/null > /dev/null 2>&1 &
"""
"""Shell commands: count what is asked, in the memory of a process; meanwhile write to disk and memory."""

_END = """
touch /run/stop; until test -e /run/stopped; do usleep 20000; done; sync
awk 'NR != $1 {wrong = 1} END {print NR, wrong + 0}' /root/written
"""
"""Shell commands: stop writing; how many lines there are in the file, and whether any is wrong."""


@dataclass(frozen=True)
class Bridged:
    """The sites, and the names of the network namespaces."""

    sites: tuple[PeerSite, PeerSite]
    namespaces: tuple[str, str]
    client: str
    overlay: Path

    def in_guest(self, script: str) -> str:
        """What a shell script prints in the guest, asked for by the client."""
        request = urllib.request.Request(f"http://{GUEST}:{WEB}/cgi-bin/run", script.encode())

        def ask() -> str:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return bytes(answer.read()).decode().strip()

        return inside(self.client, ask)


@contextmanager
def bridged_sites(folder: Path, made: Made) -> Iterator[Bridged]:
    """Both sites are served, in namespaces that are joined; nothing is left when the context is."""
    with joined_networks() as (first, second, client), ExitStack() as stack:
        sites = tuple(
            stack.enter_context(_site(folder / name, made, namespace, address))
            for name, namespace, address in zip("ab", (first, second), _BACKHAUL, strict=True)
        )
        one, other = sites
        one.peer_id, other.peer_id = add_peer(one, other), add_peer(other, one)
        yield Bridged((one, other), (first, second), client, made.overlay)


@contextmanager
def joined_networks() -> Iterator[tuple[str, str, str]]:
    """The names of three namespaces: of two sites with joined bridges, and of a client at the first's."""
    names = tuple(f"cloudlet-{os.getpid()}-{name}" for name in ("a", "b", "client"))
    first, second, client = names
    sites = (first, second)
    with ExitStack() as stack:
        for name in names:
            _ip(f"netns add {name}")
            stack.callback(_ip, f"netns delete {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"-n {first} link add backhaul mtu 1600 type veth peer name backhaul mtu 1600 netns {second}")
        _ip(f"-n {first} link add user type veth peer name user netns {client}")
        for site, here, there in zip(sites, _BACKHAUL, reversed(_BACKHAUL), strict=True):
            _ip(f"-n {site} address add {here}/30 dev backhaul")
            _ip(f"-n {site} link set backhaul up")
            _run(f"tc -n {site} qdisc add dev backhaul root tbf {_RATE}")
            _ip(f"-n {site} link add {BRIDGE} type bridge")
            _ip(f"-n {site} link set {BRIDGE} up")
            _ip(f"-n {site} link add tunnel type vxlan id 7 local {here} remote {there} dstport 4789")
            _ip(f"-n {site} link set tunnel mtu 1500 master {BRIDGE} up")
        _ip(f"-n {first} link set user master {BRIDGE} up")
        _ip(f"-n {client} address add {_CLIENT} dev user")
        _ip(f"-n {client} link set user up")
        yield first, second, client


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Do some work in a thread that is in a network namespace."""

    def there() -> T:
        enter(namespace)
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(there).result()


def enter(namespace: str) -> None:
    """Have the calling thread, which has to end by itself, be in a network namespace from now on."""
    with Path(f"/run/netns/{namespace}").open("rb") as file:
        if _libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


class Asker:
    """A user who holds one connection, and asks again a moment after an answer has come."""

    def __init__(self, namespace: str) -> None:
        self.answers = 0
        self.longest = 0.0
        """Seconds that an answer took at most."""
        self.problem = ""
        self._namespace = namespace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asker")
        self._thread.start()

    def end(self) -> None:
        """Ask no more, and hang up."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        enter(self._namespace)
        try:
            with (
                socket.create_connection((GUEST, COUNTER), ANSWER_SECONDS) as connection,
                connection.makefile("rb") as answers,
            ):
                connection.settimeout(ANSWER_SECONDS)
                while not self._stop.wait(ASK_SECONDS) and not self.problem:
                    self._ask(connection, answers)
        except OSError as error:
            self.problem = f"after {self.answers} answers: {error!r}"

    def _ask(self, connection: socket.socket, answers: Any) -> None:
        asked = f"{self.answers + 1} is-it-{self.answers * 7919}"
        began = time.monotonic()
        connection.sendall(f"{asked.partition(' ')[2]}\n".encode())
        answer = answers.readline().decode().strip()
        self.longest = max(self.longest, time.monotonic() - began)
        if answer == asked:
            self.answers += 1
        else:
            self.problem = f"after {self.answers} answers: {answer!r}, not {asked!r}"


def walk(world: Bridged, count: int, seed: int) -> Iterator[str]:
    """An instance goes ``count`` times to the other site while it works for a user; what is wrong then."""
    dice = random.Random(seed)
    here, there = world.sites
    with ExitStack() as stack:
        instance = here.call.start(here.call.publish(world.overlay, name=f"walk-{seed}"))
        stack.callback(lambda: here.call.done(here.call.delete(f"/v1/instances/{instance['id']}")))
        world.in_guest(_BEGIN)
        asker = Asker(world.client)
        stack.callback(asker.end)
        for number in range(count):
            time.sleep(dice.uniform(0.2, 1.5))
            error = _hand_off(here, instance["id"])
            before = asker.answers
            _wait(lambda before=before: asker.answers > before + 5 or asker.problem)
            if error or asker.problem:
                yield f"seed {seed}, hand-off {number + 1}: {error or asker.problem}"
                return
            here, there = there, here
        asker.end()
        print(f"{count} hand-offs, {asker.answers} answers, the longest after {asker.longest:.2f} s")
        lines, wrong = map(int, world.in_guest(_END).split())
        if wrong or not lines:
            yield f"seed {seed}: the file has {lines} lines, {wrong} wrong, after {asker.answers} answers"
        here.call.post(f"/v1/instances/{instance['id']}/pause")
        yield from (f"seed {seed}: {problem}" for problem in _check_disk(here))


def _hand_off(site: PeerSite, instance_id: str) -> str:
    """Have an instance handed off to the site's peer; why it was not."""
    wanted = {"instance_id": instance_id, "peer_id": site.peer_id, "verify": "full", "overlay": "nothing"}
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        done = site.call.ended(site.call.post("/v1/handoffs", {"handoff": wanted})["operation"])
        if done["state"] == "succeeded":
            return ""
        refused = done["error"]["code"] == "cloudlet.operation.conflict"
        if not refused or time.monotonic() > deadline:
            return str(done["error"])
        time.sleep(0.2)  # it has just come, and is told what time it is


def _check_disk(site: PeerSite) -> Iterator[str]:
    """What is wrong with the file system of a paused machine that stands on its base only."""
    ((folder, record),) = records(site.settings.instances_dir)
    base = Site.open(site.settings).bases.get(record.base_id)
    with tempfile.TemporaryDirectory(dir=site.folder) as temporary:
        disk = Path(temporary) / "disk.raw"
        guest.save_disk([folder / DISK], base, disk)
        # The journal of a disk that was in use is replayed, as at the next boot; then nothing is wrong.
        for options, good in (("-p", (0, 1)), ("-fn", (0,))):
            done = subprocess.run(["e2fsck", options, disk], capture_output=True, text=True, check=False)
            if done.returncode not in good:
                yield f"e2fsck {options}: {done.returncode}: {done.stdout}"


@contextmanager
def _site(folder: Path, made: Made, namespace: str, address: str) -> Iterator[PeerSite]:
    """A site that is served in a namespace, and by a Unix socket in its folder."""
    trusted = folder / "keys" / "trusted"
    trusted.mkdir(parents=True)
    for key in (made.keys / "trusted").glob("*.pub"):
        shutil.copy(key, trusted / f"publisher-{key.name}")
    api = folder / "api.sock"
    file = settings_file(
        folder, Made(made.cache, folder / "keys", made.base_id, made.overlay), "",
        DEFAULT={"hypervisor": "qemu", "accelerator": "tcg", "cache_dir": made.cache, "bridge": BRIDGE},
        api={"listen": f"unix:{api}", "auth_strategy": "noauth"},
        peers={"listen": f"{address}:8791", "grace_seconds": 1},
    )  # fmt: skip
    log = folder / "cloudlet.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OS_")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{namespace}", *serve_command(file)],
            stdout=out, stderr=out, env=environment,
        )  # fmt: skip
    call = Caller("http://site", None)
    call.session.trust_env = False
    call.session.mount("http://site/", UnixAdapter(api))
    site = PeerSite(file, Served(process, log, call))
    try:
        site.served.wait_log("serving at")
        yield site
    finally:
        call.session.close()
        site.end()
        end_machines(site.settings)


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 2 * ANSWER_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "no answer, and no error either"
        time.sleep(ASK_SECONDS)


def _ip(arguments: str) -> None:
    _run(f"ip {arguments}")


def _run(command: str) -> None:
    """Do something to the network.

    :raises AssertionError: it cannot be done here.
    """
    done = None
    with suppress(FileNotFoundError):
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert done and done.returncode == 0, (
        f"{command}: {done.stderr.strip() if done else 'not found'}. This takes root, iproute2, and a kernel "
        "with network namespaces, veth, bridge, vxlan and tbf"
    )
