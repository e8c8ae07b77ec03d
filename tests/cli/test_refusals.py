"""What cannot be done is refused with one line that says what to do, and with the exit code of its kind."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cloudlet.errors import ExitCode, of_the_system
from cloudlet.overlay.reader import OverlayReader
from cloudlet.settings import Settings
from tests.cli.bases import document, renamed, write_document
from tests.cli.conftest import RECIPE, Hello, copy, write_recipe
from tests.cli.damage import signed, signer
from tests.cli.test_corruption import refused
from tests.cli.traces import DEADLINE, traces
from tests.conftest import CommandLine, Finished
from tests.unit.overlay.forge import Forged

PROGRAMS = ("qemu-system-x86_64", "qemu-img", "xorriso", "prlimit", "unshare", "setpriv", "sh")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH with all programs that are used, from which a test takes some away."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def test_the_base_is_not_here(made: Hello, settings: Settings, cloudlet: CommandLine) -> None:
    shutil.copytree(made.keys, settings.keys_dir)
    assert "cloudlet base import" in refused(cloudlet("run", made.path), 3)


@pytest.mark.parametrize(("field", "value"), [("cpu_model", "EPYC"), ("accelerator", "kvm"), ("layout", 99)])
def test_a_capture_of_another_machine_is_refused_from_its_root_alone(
    field: str, value: str, hello: Hello, own_base: Path, settings: Settings, cloudlet: CommandLine
) -> None:
    other = renamed(own_base, lambda description: description["machine"].update({field: value}))
    forged = Forged.of(hello.path.read_bytes())
    machine = type(forged.root.machine).from_json({**forged.root.machine.to_json(), field: value})
    forged.root = replace(forged.root, base=other.name, machine=machine)
    overlay = signed(forged.data(), signer(settings))
    ours, theirs = os.pipe()
    try:
        os.write(theirs, overlay[: _parts_start(overlay)])
        # The pipe stays open: no byte of a frame has come when the command has ended.
        done = subprocess.run(
            cloudlet.argv("run", "-"),
            stdin=ours,
            capture_output=True,
            text=True,
            env=cloudlet.environment,
            timeout=DEADLINE,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, done.stdout) == (7, "")
    assert str(value) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _parts_start(overlay: bytes) -> int:
    return OverlayReader(io.BytesIO(overlay), None, allow_unsigned=True).header.parts_start


@pytest.mark.qemu
def test_a_port_that_is_taken(hello: Hello, cloudlet: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"{port} is taken" in refused(cloudlet("run", hello.path, "-p", f"{port}:8080"), 5)


def test_the_state_folder_is_a_file(hello: Hello, cloudlet: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--state-dir" in refused(cloudlet("--state-dir", folder, "run", hello.path), 4)


@pytest.mark.parametrize("small_place", ["1m,ro"], indirect=True)
def test_the_state_folder_is_read_only(small_place: Path, hello: Hello, cloudlet: CommandLine) -> None:
    assert "--state-dir" in refused(cloudlet("--state-dir", small_place, "run", hello.path), 4)
    assert cloudlet("--state-dir", small_place, "ps").status == 0


@pytest.mark.parametrize("small_place", ["1m"], indirect=True)
def test_a_cache_that_others_keep_may_be_read_only(
    small_place: Path, own_base: Path, hello: Hello, cloudlet: CommandLine
) -> None:
    subprocess.run(["mount", "--bind", own_base.parents[1], small_place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", small_place], check=True)
        assert hello.base_id[:16] in cloudlet("--cache-dir", small_place, "base", "list").out
        done = cloudlet("--cache-dir", small_place, "base", "delete", hello.base_id)
        refused(done, 4)
    finally:
        subprocess.run(["umount", small_place], check=True)


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("qemu-system-x86_64", "apt-get install qemu-system-x86"),
        ("xorriso", "apt-get install xorriso"),
        ("setpriv", "apt-get install util-linux"),
    ],
)
def test_a_program_is_missing(
    missing: str, says: str, hello: Hello, cloudlet: CommandLine, programs: Path, tmp_path: Path
) -> None:
    (programs / missing).unlink()
    create = ["-q", "overlay", "create", hello.base_id, "--recipe", hello.recipe, "-o", tmp_path / "x"]
    done = cloudlet(*create, PATH=str(programs))
    assert done.status == 3, done.err
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert traces(cloudlet.settings, tmp_path) == []


def test_the_program_that_reads_images_is_missing(
    cloudlet: CommandLine, programs: Path, tmp_path: Path
) -> None:
    (programs / "qemu-img").unlink()
    (tmp_path / "image.raw").write_bytes(bytes(1 << 20))
    line = refused(cloudlet("-q", "base", "import", tmp_path / "image.raw", PATH=str(programs)), 3)
    assert "apt-get install qemu-utils" in line


def test_qemu_is_too_old(hello: Hello, cloudlet: CommandLine, programs: Path) -> None:
    old = programs / "qemu-system-x86_64"
    old.unlink()
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)'\n")
    old.chmod(0o755)
    line = refused(cloudlet("run", hello.path, PATH=str(programs)), 3)
    assert "5.2" in line
    assert "7.2" in line


@pytest.mark.parametrize("name", ["ram", "disk.raw", "device-state"])
def test_a_damaged_base_is_found(name: str, own_base: Path, cloudlet: CommandLine) -> None:
    assert cloudlet("base", "verify", own_base.name).status == 0
    copy(own_base / name, own_base / "copy")
    (own_base / "copy").replace(own_base / name)
    with (own_base / name).open("r+b") as file:
        at = (own_base / name).stat().st_size // 2
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert f"{name} of base" in refused(cloudlet("base", "verify", own_base.name), 7)
    (own_base / name).unlink()
    refused(cloudlet("base", "verify", own_base.name), 3)


DESCRIPTIONS = [
    b"",
    b"\xff\xfe",
    b'{"name": "x", "created": "", "description": {"format": 1}}',
    b'{"name": "x", "created": "", "description": []}',
]


def test_a_damaged_description_is_found(own_base: Path, cloudlet: CommandLine) -> None:
    for damage in DESCRIPTIONS:
        (own_base / "base.json").unlink()
        (own_base / "base.json").write_bytes(damage)
        assert f"remove {own_base}" in refused(cloudlet("base", "list"), 7)


def test_a_description_with_another_rule_is_not_this_base(own_base: Path, cloudlet: CommandLine) -> None:
    content = document(own_base)
    content["description"]["ready"] = "whenever"
    write_document(own_base, content)
    refused(cloudlet("base", "list"), 7)
    content["description"]["ready"] = "tcp:1"
    write_document(own_base, content)
    refused(cloudlet("base", "verify", own_base.name), 7)


RECIPES = [
    ("", "the document"),
    ("name: [", "not YAML"),
    ("name: Has Spaces\n", "name"),
    (RECIPE + "colour: blue\n", "colour"),
    (RECIPE.replace("8080, name", "80800, name"), "ports.0.port"),
    (RECIPE.replace("from: files/", "from: ../files"), "files.0.from"),
    (RECIPE.replace("http:8080/", "whenever"), "ready"),
    ("name: \xff".encode("latin-1"), "UTF-8"),
]


def test_a_recipe_that_does_not_validate(own_base: Path, cloudlet: CommandLine, tmp_path: Path) -> None:
    def create(text: str | bytes) -> Finished:
        folder = write_recipe(Path(tempfile.mkdtemp(dir=tmp_path)) / "recipe")
        (folder / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return cloudlet(
            "overlay", "create", own_base.name, "--unsigned", "--recipe", folder, "-o", tmp_path / "x"
        )

    with ThreadPoolExecutor(4) as pool:
        for (text, says), done in zip(RECIPES, pool.map(create, [text for text, _ in RECIPES]), strict=True):
            assert done.status == 2, f"{text!r}: {done}"
            assert says in done.err, f"{text!r}: {done}"
            assert len(done.err.splitlines()) == 1


def test_a_recipe_that_is_not_there(own_base: Path, cloudlet: CommandLine, tmp_path: Path) -> None:
    for recipe in (tmp_path / "nowhere", own_base / "ram"):
        done = cloudlet(
            "overlay", "create", own_base.name, "--unsigned", "--recipe", recipe, "-o", tmp_path / "x"
        )
        assert "recipe.yaml" in refused(done, 3)


@pytest.mark.qemu
def test_a_command_of_a_recipe_fails(hello: Hello, cloudlet: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "x"
    for text, says in (
        ("name: x\nrun: ['echo the reason >&2; exit 7']\n", ("gave 7", "the reason")),
        ("name: x\nprepare: ['echo the reason >&2; exit 7']\n", ("gave 7", "the reason")),
    ):
        recipe = write_recipe(tmp_path / f"recipe-{len(text)}", text)
        done = cloudlet("-q", "overlay", "create", hello.base_id, "--recipe", recipe, "-o", output)
        assert done.status == 1
        assert all(word in done.err for word in says), done.err
        assert not output.exists()
        assert traces(cloudlet.settings, tmp_path) == []


def test_a_recipe_needs_a_guest_agent(own_base: Path, hello: Hello, cloudlet: CommandLine, tmp_path: Path):
    without = renamed(own_base, lambda description: description["guest"].update(agent=False))
    assert "NOT renewed" in cloudlet("base", "show", without.name).out
    done = cloudlet("overlay", "create", without.name, "--recipe", hello.recipe, "-o", tmp_path / "x")
    assert "--interactive" in refused(done, 2)


def all_end(cloudlet: CommandLine, commands: Sequence[Sequence[str | Path]], status: int) -> None:
    """Run commands, some at a time; each must end with this status and a line at its end, no traceback."""
    with ThreadPoolExecutor(4) as pool:
        for arguments, done in zip(commands, pool.map(lambda a: cloudlet(*a), commands), strict=True):
            assert (done.status, done.out) == (status, ""), f"{arguments}: {done}"
            assert done.err.splitlines()[-1].startswith("cloudlet"), f"{arguments}: {done}"
            assert "Traceback" not in done.err


def test_what_is_written_wrong(hello: Hello, cloudlet: CommandLine) -> None:
    commands = [
        ["run", "{hello}", "-p", "8080"],
        ["run", "{hello}", "-p", "http:8080"],
        ["run", "{hello}", "-p", "8000:0"],
        ["run", "{hello}", "--rate", "fast"],
        ["run", "{hello}", "--rate", "0"],
        ["base", "import", "{hello}", "--memory", "lots"],
        ["base", "import", "{hello}", "--memory", "65M"],
        ["base", "import", "{hello}", "--ready", "whenever"],
        ["base", "import", "{hello}", "--initrd", "{hello}"],
        ["base", "import", "{hello}", "--seed", "{hello}", "--cloud-init"],
        ["key", "trust", "x", "{hello}"],
        ["key", "distrust", "../../x"],
        ["overlay", "sign", "-"],
        ["run", "x", "--bogus"],
    ]
    all_end(cloudlet, [[text.format(hello=hello.path) for text in command] for command in commands], 2)


def test_what_is_not_there(hello: Hello, cloudlet: CommandLine) -> None:
    commands = [
        ["run", "/nowhere/x.overlay"],
        ["base", "show", "nothing"],
        ["key", "show", "nobody"],
        ["key", "trust", "x", "/nowhere/x.pub"],
        ["overlay", "sign", "{hello}", "--key", "nobody"],
        ["overlay", "create", "{base}", "--recipe", "{recipe}", "-o", "/tmp/x", "--key", "nobody"],
        ["base", "export", "{base}", "-o", "/nowhere/x"],
        ["stop", "nobody"],
    ]
    values = {"hello": hello.path, "base": hello.base_id, "recipe": hello.recipe}
    all_end(cloudlet, [[text.format(**values) for text in command] for command in commands], 3)


def test_a_folder_in_the_place_of_a_file(hello: Hello, cloudlet: CommandLine, tmp_path: Path) -> None:
    commands: list[list[str | Path]] = [
        ["run", tmp_path],
        ["base", "export", hello.base_id, "-o", tmp_path],
        ["overlay", "sign", hello.path, "-o", tmp_path],
        ["overlay", "create", hello.base_id, "--recipe", hello.recipe, "-o", tmp_path],
    ]
    all_end(cloudlet, commands, 2)


@pytest.mark.qemu
@pytest.mark.parametrize("most", [10, 14, 18])
def test_too_few_descriptors(most: int, hello: Hello, cloudlet: CommandLine) -> None:
    done = subprocess.run(
        ["prlimit", f"--nofile={most}", *cloudlet.argv("run", hello.path)],
        capture_output=True,
        text=True,
        env=cloudlet.environment,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    (line,) = done.stderr.splitlines()
    assert "ulimit -n" in line


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.ENOSPC, ExitCode.NO_CAPACITY),
        (errno.EDQUOT, ExitCode.NO_CAPACITY),
        (errno.EMFILE, ExitCode.NO_CAPACITY),
        (errno.EACCES, ExitCode.REFUSED),
        (errno.EROFS, ExitCode.REFUSED),
        (errno.ENOENT, ExitCode.NOT_FOUND),
        (errno.EIO, ExitCode.FAILED),
    ],
)
def test_what_the_kernel_refuses_has_an_exit_code(number: int, status: ExitCode) -> None:
    told = of_the_system(OSError(number, os.strerror(number), "/a/file"))
    assert told.exit_code == status
    assert str(told).startswith("/a/file: ")
    assert of_the_system(MemoryError()).exit_code == ExitCode.NO_CAPACITY
