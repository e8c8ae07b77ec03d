"""What a guest, and a QEMU that a guest has taken over, can reach: nothing but what it was given.

The confinement needs root (a user per machine); without it these tests fail.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cloudlet.control.site import Site
from cloudlet.hypervisor.qemu import launch
from cloudlet.hypervisor.qemu.instance import QemuInstance
from cloudlet.model import PublishedPort
from cloudlet.store.bases import Base
from tests.addresses import host_addresses
from tests.qemu import guest

pytestmark = pytest.mark.qemu

GATEWAY = "10.0.2.2"
_GUEST_PORT = 8080


class Counting:
    """Listens on every address of this machine, TCP and UDP, and counts who comes."""

    def __init__(self) -> None:
        self.callers: list[str] = []
        self._closing = False
        self._tcp = socket.create_server(("0.0.0.0", 0))
        self.port: int = self._tcp.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("0.0.0.0", self.port))
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._accept, self._receive)]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, (host, _) = self._tcp.accept()
                self.callers.append(f"tcp {host}")
                connection.close()

    def _receive(self) -> None:
        with suppress(OSError):
            while not self._closing:
                _, sender = self._udp.recvfrom(64)
                if sender:
                    self.callers.append(f"udp {sender[0]}")

    def close(self) -> None:
        self._closing = True
        for kind in (self._tcp, self._udp):
            with suppress(OSError):
                kind.shutdown(socket.SHUT_RDWR)
            kind.close()
        for thread in self._threads:
            thread.join(5.0)


@contextmanager
def counting() -> Iterator[Counting]:
    listener = Counting()
    try:
        yield listener
    finally:
        listener.close()


@pytest.fixture
def pair(site: Site, quick_base: Base) -> Iterator[tuple[QemuInstance, QemuInstance]]:
    """Two guests, each with its web server published on every address of this machine."""
    ports = [PublishedPort(_GUEST_PORT, host="0.0.0.0")]
    with (
        guest.resumed(site, quick_base, ports) as one,
        guest.resumed(site, quick_base, ports) as other,
    ):
        yield one, other


@pytest.fixture
def instance(site: Site, quick_base: Base) -> Iterator[QemuInstance]:
    with guest.resumed(site, quick_base) as one:
        yield one


def test_a_guest_reaches_nobody(pair: tuple[QemuInstance, QemuInstance]) -> None:
    one, other = pair
    published = other.endpoints[0].host_port
    with counting() as listener:
        # Both are there for who may: else silence would prove nothing.
        with socket.create_connection(("127.0.0.1", listener.port), 5.0) as mine:
            assert mine.recv(1) == b""
        assert listener.callers == ["tcp 127.0.0.1"]
        with socket.create_connection(("127.0.0.1", published), 5.0) as mine:
            mine.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert mine.recv(4) == b"HTTP"
        assert guest.shell(one, f"nc -w 2 127.0.0.1 {_GUEST_PORT} < /dev/null && echo reached") == "reached"

        addresses = [GATEWAY, "10.0.2.3", "10.0.2.255", "169.254.169.254", "192.0.2.1", *host_addresses()]
        tries = " ".join(f"{address}:{port}" for address in addresses for port in (listener.port, published))
        script = f"""
        set +e
        for try in {tries}; do
          address=${{try%:*}} port=${{try#*:}}
          (nc -w 1 $address $port < /dev/null 2>/dev/null && echo "reached $try") &
          timeout 1 tftp -g -l /dev/null -r x $address $port 2>/dev/null &
        done
        wait
        # The loopback's addresses, sent over the cable.
        echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
        ip address del 127.0.0.1/8 dev lo
        ip route add 127.0.0.0/8 via {GATEWAY}
        for port in {listener.port} {published}; do
          nc -w 1 127.0.0.1 $port < /dev/null 2>/dev/null && echo "reached 127.0.0.1:$port"
        done
        awk '$1 == "Udp:" && $5 ~ /[0-9]/ {{print $5}}' /proc/net/snmp
        """
        datagrams = guest.shell(one, script, timeout=60.0)
        assert int(datagrams) >= len(addresses), "none was reached, and the datagrams were really sent"
        assert listener.callers == ["tcp 127.0.0.1"], "none but the test itself"


def test_guests_do_not_share_a_cable(pair: tuple[QemuInstance, QemuInstance]) -> None:
    """Neither the public card nor the private one of two instances is on one network."""
    for number, instance in enumerate(pair, 1):
        guest.shell(
            instance,
            f"ip link set eth1 up; ip address add 10.9.9.{number}/24 dev eth1; "
            f"ip address add 10.0.2.{100 + number}/24 dev eth0",
        )
    ask = "ping -c 1 -W 1 {0} > /dev/null && echo reached {0}; true"
    assert guest.shell(pair[0], ask.format("10.0.2.101")) == "reached 10.0.2.101", "itself it reaches"
    for there in ("10.9.9.2", "10.0.2.102"):
        assert guest.shell(pair[0], ask.format(there)) == ""


def test_each_machine_is_a_process_of_a_user_of_its_own_without_rights(
    pair: tuple[QemuInstance, QemuInstance],
) -> None:
    users = set()
    for instance in pair:
        status = status_of(pid_of(instance))
        ids = status["Uid"].split()
        assert len(set(ids)) == 1, "real, effective, saved and file system user are one"
        assert ids == status["Gid"].split()
        assert status["Groups"].strip() == ""
        users.add(int(ids[0]))
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        limits = Path(f"/proc/{pid_of(instance)}/limits").read_text()
        assert "Max core file size        0 " in limits
    assert len(users) == 2
    assert users & {0, os.getuid()} == set()


def test_a_machine_has_a_network_of_its_own_with_nothing_in_it(
    pair: tuple[QemuInstance, QemuInstance],
) -> None:
    spaces = {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in ("self", *map(pid_of, pair))}
    assert len(spaces) == 3
    for instance in pair:
        proc = Path(f"/proc/{pid_of(instance)}/net")
        interfaces = [line.split(":")[0].strip() for line in (proc / "dev").read_text().splitlines()[2:]]
        assert interfaces == ["lo"]
        for table in ("if_inet6", "route", "arp"):
            assert len((proc / table).read_text().splitlines()) <= (0 if table == "if_inet6" else 1)
        assert (proc / "fib_trie").read_text().count("host LOCAL") == 0, "not even lo is up"


def test_a_machine_holds_no_descriptor_that_is_not_its_own(instance: QemuInstance, quick_base: Base) -> None:
    pid, image = pid_of(instance), quick_base.image()
    may_write = {instance.directory / name for name in ("qemu.log", "console.log", "disk.qcow2")}
    may_read = {image.disk, image.kernel, image.initrd}
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    sockets = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = str(entry.readlink())
        flags = int(Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0], 8)
        match target.partition(":")[0]:
            case "anon_inode":
                assert target.removeprefix("anon_inode:") in ("[eventfd]", "[signalfd]", "[eventpoll]")
            case "socket":
                sockets += 1
            case "/memfd":
                assert target.startswith(f"/memfd:cloudlet-base-{quick_base.id[:32]} ")
            case "/dev/null":
                assert entry.name == "0"
            case _ if Path(target) in may_write:
                pass
            case _ if Path(target) in may_read:
                assert flags & os.O_ACCMODE == os.O_RDONLY, f"{target} can be written"
            case _:
                pytest.fail(f"descriptor {entry.name} is {target}")
    # Monitor, agent and console listen; the network's cable; connections of this test (monitor, agent).
    assert 4 <= sockets <= 6


def test_an_instance_folder_is_for_its_owner_only(instance: QemuInstance) -> None:
    for path in (instance.directory.parent, instance.directory):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.stat().st_uid == os.getuid()
    for path in instance.directory.glob("*.sock"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


_ATTEMPTS = r"""
import json, os, signal, socket, sys
wanted = json.load(sys.stdin)
failed, succeeded = {}, []
def attempt(name, action):
    try:
        action()
        succeeded.append(name)
    except OSError as error:
        failed[name] = error.strerror
def write(path):
    with open(path, "r+b", buffering=0) as file:
        file.write(file.read(1))
def connect(kind, address):
    with socket.socket(kind, socket.SOCK_STREAM) as client:
        client.settimeout(5.0)
        client.connect(address)
def create(folder):
    os.close(os.open(folder + "/new", os.O_WRONLY | os.O_CREAT, 0o600))
def raw():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
for path in wanted["files"]:
    attempt("read " + path, lambda: open(path, "rb").close())
for path in wanted["files"] + wanted["bases"]:
    attempt("write " + path, lambda: write(path))
for folder in wanted["folders"]:
    attempt("list " + folder, lambda: os.listdir(folder))
    attempt("create in " + folder, lambda: create(folder))
for pid in wanted["pids"]:
    attempt("signal %d" % pid, lambda: os.kill(pid, signal.SIGKILL))
    attempt("memory of %d" % pid, lambda: open("/proc/%d/mem" % pid, "rb").close())
    attempt("descriptors of %d" % pid, lambda: os.listdir("/proc/%d/fd" % pid))
    attempt("environment of %d" % pid, lambda: open("/proc/%d/environ" % pid, "rb").read())
for path in wanted["sockets"]:
    attempt("connect " + path, lambda: connect(socket.AF_UNIX, path))
attempt("connect to loopback", lambda: connect(socket.AF_INET, ("127.0.0.1", wanted["port"])))
attempt("connect to abstract", lambda: connect(socket.AF_UNIX, "\0" + wanted["abstract"]))
attempt("raw socket", raw)
attempt("become root", lambda: os.setuid(0))
attempt("become another", lambda: os.setuid(wanted["other"]))
attempt("leave the cage", lambda: os.chroot("/"))
json.dump({"uid": os.getuid(), "failed": failed, "succeeded": succeeded}, sys.stdout)
"""


def test_a_process_confined_as_a_machine_can_do_nothing_to_others(
    pair: tuple[QemuInstance, QemuInstance], quick_base: Base
) -> None:
    """Real attempts by a program in QEMU's place; without its system call filter, which only adds to this."""
    one, other = pair
    uid, theirs = one.record.uid, other.record.uid
    assert uid
    assert theirs
    image = quick_base.image()
    program = shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin")
    assert program, "an interpreter that any user may start"
    with (
        counting() as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abstract,
    ):
        abstract.bind(f"\0cloudlet-test-{os.getpid()}")
        abstract.listen(1)
        order = {
            "files": [
                str(path)
                for instance in pair
                for path in instance.directory.iterdir()
                if path.is_file() and not path.is_socket()
            ],
            "bases": [str(path) for path in (image.ram, image.disk, image.device_state)],
            "folders": [str(instance.directory) for instance in pair] + [str(quick_base.path)],
            "pids": [pid_of(other), other.record.network.pid if other.record.network else 0, os.getpid()],
            "sockets": [str(path) for instance in pair for path in instance.directory.glob("*.sock")],
            "port": listener.port,
            "abstract": f"cloudlet-test-{os.getpid()}",
            "other": theirs,
        }
        assert len(order["files"]) >= 10  # type: ignore[arg-type]
        result = confined([program, "-I", "-c", _ATTEMPTS], uid, json.dumps(order))
        told = json.loads(result)
        assert told["uid"] == uid
        assert told["succeeded"] == []
        assert len(told["failed"]) > 40
        assert listener.callers == []
    for instance in pair:
        assert guest.shell(instance, "echo alive") == "alive"


def test_a_machine_can_open_the_shared_ram_but_not_write_it(instance: QemuInstance, quick_base: Base) -> None:
    """QEMU has to hold it for writing; what it could then do with it, tried by a program in its place."""
    uid = instance.record.uid
    assert uid
    attempt = """
import fcntl, mmap, os, sys
descriptor = int(sys.argv[1])
again = os.open("/proc/self/fd/%d" % descriptor, os.O_RDWR)
for one in (descriptor, again):
    for action in (
        lambda: os.pwrite(one, b"x", 0),
        lambda: os.ftruncate(one, 0),
        lambda: mmap.mmap(one, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    ):
        try:
            action()
        except PermissionError:
            continue
        sys.exit("it could be written")
print("sealed")
"""
    ram = os.open(f"/proc/{pid_of(instance)}/fd/{instance.record.ram_descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        program = shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin")
        assert program
        assert confined([program, "-I", "-c", attempt, str(ram)], uid, pass_fds=[ram]).strip() == "sealed"
    finally:
        os.close(ram)


def confined(argv: Sequence[str], uid: int, text: str = "", pass_fds: Sequence[int] = ()) -> str:
    """Run a program as machines are run; what it prints."""
    result = subprocess.run(
        [*launch.confinement(uid), *argv],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env={"PATH": os.defpath},
        pass_fds=pass_fds,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def pid_of(instance: QemuInstance) -> int:
    assert instance.record.machine
    return instance.record.machine.pid


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
