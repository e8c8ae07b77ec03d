"""The fake guest: its shell against the real one, its files, its pages."""

from __future__ import annotations

import json
import mmap
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from cloudlet.control.media import write_iso
from cloudlet.hypervisor.fake.files import COUNTER_PAGE, PAGE, Files, page_of
from cloudlet.hypervisor.fake.guest import CLONE_AGENT, QUIET, Guest
from cloudlet.hypervisor.fake.optical import read_image

SIZE = 1 << 20


class Machine:
    """A guest on bytes of this process, and what it prints."""

    def __init__(self) -> None:
        self.ram, self.disk = mmap.mmap(-1, SIZE), mmap.mmap(-1, SIZE)
        self.console: list[str] = []
        self.guest = Guest(self.ram, self.disk, self.console.append)
        self.guest.boot("first")

    def sh(self, script: str, *options: str) -> tuple[int, str]:
        status, out, err = self.guest.run(["/bin/sh", *(options or ("-c",)), script], b"")
        return status, (out + err).decode()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.ram.close()
    made.disk.close()


@pytest.mark.parametrize(
    "script",
    [
        "echo a b  c; echo 'a  b' \"c  d\"",
        "echo one\necho two",
        "true && echo yes || echo no; false && echo yes || echo no",
        "false || true && echo both",
        "! false && echo not; ! true || echo never",
        'x=1; y="$x$x"; echo $y \'$y\' "\\$y" \\$y',
        'echo "it\'s" \'a "quote"\' "a \\"quote\\"" "back\\\\slash" "kept\\q"',
        "for w in a b c; do echo -n $w; done; echo",
        "for w in a b c; do test $w = b && break; echo $w; done; echo $w",
        "for a in 1 2; do for b in x y; do echo $a$b; done; done",
        'echo "$(dirname /a/b/c)" $(echo nested)',
        "echo a | cat; echo hidden > /dev/null; echo shown 2>/dev/null",
        "exit 3; echo never",
        "true; exit",
        "false; echo $?",
        "test -n '' ; echo $?; [ a = a ] && echo same; test ! a = b && echo other",
        "echo a # a comment\n# another\necho 'b # no comment' c#d",
        "echo long \\\nline",
        "true &&\n\n echo on the next line",
        "echo in > /dev/null 2>&1; echo out",
        'x=\'a b\'; echo "$x"; echo "$undefined."',
        "false",
        "",
        "\n\n",
        "there-is-none >/dev/null 2>&1; echo $?",
    ],
)
@pytest.mark.parametrize("option", ["-c", "-ec"])
def test_scripts_do_what_they_do_in_a_real_shell(machine: Machine, script: str, option: str) -> None:
    real = subprocess.run(["/bin/sh", option, script], capture_output=True, timeout=10, check=False)
    assert machine.sh(script, option) == (real.returncode, (real.stdout + real.stderr).decode())


def test_arguments(machine: Machine) -> None:
    status, out, _ = machine.guest.run(
        ["/bin/sh", "-c", 'echo "$0" "$1" "$2" $#', "zero", "one", "t w o"], b""
    )
    assert (status, out) == (0, b"zero one t w o 2\n")


@pytest.mark.parametrize(
    "script", ["for", "for x in a", "a && ", "| b", "echo 'open", "echo a && && b", "> "]
)
def test_what_is_not_in_the_language(machine: Machine, script: str) -> None:
    status, said = machine.sh(script)
    assert status == 2
    assert said.startswith("sh: ")


def test_files_are_where_their_path_says(machine: Machine) -> None:
    status, said = machine.sh(
        "mkdir -p /srv/app /run/app; echo on disk > /srv/app/word; echo in RAM > /run/app/word;"
        " echo more >> /srv/app/word; cp /srv/app/word /srv/copy; cp -a /srv/app/. /run/two;"
        " cat /srv/copy /run/two/word < /dev/null; ls /srv; rm -rf /srv/app; test ! -e /srv/app && echo gone",
        "-ec",
    )
    assert (status, said) == (0, "on disk\nmore\non disk\nmore\napp\ncopy\ngone\n")
    assert b"in RAM\n" in machine.ram[:]
    assert b"on disk\n" in machine.disk[:]
    assert b"in RAM\n" not in machine.disk[:]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("cat /none", "No such file"),
        ("cp /none /a", "No such file"),
        ("mkdir -p /etc/hostname/below", "Not a directory"),
        ("echo x > /etc", "Is a directory"),
        ("rmdir /etc", "not empty"),
        ("mount -o ro /dev/sr0 /run", "No medium"),
        ("cp --strange a b", "unknown option"),
        ("poke ram 0 1", "can be written"),
        ("umount /run", "Not mounted"),
    ],
)
def test_what_fails_says_why(machine: Machine, script: str, says: str) -> None:
    status, said = machine.sh(script)
    assert status == 1
    assert says in said


def test_a_disk_that_is_full(machine: Machine) -> None:
    big = b"x" * (SIZE // 4)
    assert machine.guest.run(["tee", "/srv/one"], big)[0] == 0
    status, _, err = machine.guest.run(["tee", "/srv/two"], big)
    assert status == 1
    assert b"No space left" in err
    assert machine.sh("test -e /srv/two || echo none; rm /srv/one")[1] == "none\n"
    assert machine.guest.run(["tee", "/srv/two"], big)[0] == 0


def test_scripts_that_came_as_files(machine: Machine) -> None:
    status, said = machine.sh(
        "echo 'echo ran with $1' > /srv/script; chmod +x /srv/script; /srv/script words;"
        " sh /srv/script others"
    )
    assert (status, said) == (0, "ran with words\nran with others\n")
    with pytest.raises(FileNotFoundError):
        machine.guest.run(["/srv/none"], b"")


def test_a_clone_gets_an_identity(machine: Machine) -> None:
    assert machine.sh(f"test -x {CLONE_AGENT} && test -x {QUIET} && {QUIET}") == (0, "")
    before = json.loads(machine.guest.answer("/identity")[1])
    machine.guest.go_on("second")
    argv = [CLONE_AGENT, "--epoch", "1.5", "--hostname", "app-1"]
    assert machine.guest.run(argv, b"") == (0, b"{}\n", b"")
    after = json.loads(machine.guest.answer("/identity")[1])
    assert before == {"hostname": "fake", "generation": "first"}
    assert after == {"hostname": "app-1", "generation": "second"}
    assert machine.sh("hostname; cat /etc/hostname")[1] == "app-1\napp-1\n"
    assert machine.console[-1] == "generation second"


def test_its_state_is_its_bytes(machine: Machine) -> None:
    """A guest made anew on the same bytes is the same guest."""
    machine.sh("echo word > /run/word; echo word > /www/word")
    assert [machine.guest.answer("/counter")[1] for _ in range(2)] == [b"1\n", b"2\n"]
    assert machine.ram[COUNTER_PAGE * PAGE : COUNTER_PAGE * PAGE + 2] == b"\2\0"
    again = Guest(machine.ram, machine.disk, machine.console.append)
    assert again.run(["cat", "/run/word", "/www/word"], b"")[1] == b"word\nword\n"
    assert again.answer("/counter")[1] == b"3\n"
    assert again.answer("/cgi-bin/counter?peek")[1] == b"3\n"


def test_web_pages(machine: Machine) -> None:
    assert machine.guest.answer("/healthz") == (200, b"ok\n")
    assert machine.guest.answer("/") == (200, b"cloudlet fake guest\n")
    assert machine.guest.answer("/none")[0] == 404
    assert machine.guest.answer("/write?space=disk&page=200&seed=7") == (200, b"written\n")
    assert machine.disk[200 * PAGE : 201 * PAGE] == page_of(7) != page_of(8)
    for wrong in ("", "?space=rom&page=200&seed=1", "?space=ram&page=3&seed=1", "?space=ram&page=256&seed=1"):
        assert machine.guest.answer(f"/write{wrong}")[0] == 400


def test_a_medium(machine: Machine, tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "folder with spaces"
    tree.mkdir(parents=True)
    long_name = "a" * 60 + ".txt"
    (tree / long_name).write_bytes(b"deep" * 2000)
    (tmp_path / "tree" / "empty").touch()
    for number in range(80):  # more than one sector of names
        (tmp_path / "tree" / f"file-{number:03}-{'x' * 30}").write_text(str(number))
    write_iso(tmp_path / "iso", {"/0": tmp_path / "tree"}, "cloudlet")
    files = read_image(tmp_path / "iso")
    assert files[f"0/folder with spaces/{long_name}"] == b"deep" * 2000
    assert files["0/empty"] == b""
    assert {name: content for name, content in files.items() if "file-" in name} == {
        f"0/file-{number:03}-{'x' * 30}": str(number).encode() for number in range(80)
    }
    machine.guest.insert(files)
    assert (
        machine.sh("mkdir -p /run/m; mount -o ro /dev/sr0 /run/m; cp -a /run/m/0/. /srv; umount /run/m")[0]
        == 0
    )
    assert machine.sh(f"cat '/srv/folder with spaces/{long_name}'")[1] == "deep" * 2000
    with pytest.raises(ValueError, match="not an ISO"):
        read_image(tmp_path / "tree" / "empty")


class FilesMachine(RuleBasedStateMachine):
    """The file system against a dictionary; now and then it is read anew from its pages."""

    paths = Bundle("paths")

    def __init__(self) -> None:
        super().__init__()
        self.memory = mmap.mmap(-1, SIZE)
        self.files = Files(self.memory)
        self.files.format()
        self.model: dict[str, bytes] = {}

    @rule(target=paths, folder=st.sampled_from("ab"), name=st.sampled_from("xyz"))
    def name(self, folder: str, name: str) -> str:
        return f"/{folder}/{name}"

    @rule(path=paths, content=st.binary(max_size=3 * PAGE), pages=st.integers(0, 3))
    def write(self, path: str, content: bytes, pages: int) -> None:
        self.model[path] = content * (pages + 1)
        self.files.write(path, self.model[path])

    @rule(path=paths)
    def remove(self, path: str) -> None:
        if path in self.model:
            del self.model[path]
            self.files.remove(path)
        else:
            with pytest.raises(FileNotFoundError):
                self.files.remove(path)

    @rule()
    def read_anew(self) -> None:
        self.files = Files(self.memory)
        assert self.files.formatted

    @invariant()
    def all_is_there(self) -> None:
        assert {path: self.files.read(path) for path in self.files.below("/")} == self.model

    def teardown(self) -> None:
        self.memory.close()


TestFiles = FilesMachine.TestCase
TestFiles.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
