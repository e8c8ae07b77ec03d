"""cloudlet-manage and cloudlet-status: the programs of who looks after a site."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import sqlalchemy as sa

from cloudlet import settings
from cloudlet.api.identity import read_users
from cloudlet.api.policy import Policy
from cloudlet.api.table import TABLE, list_rules
from cloudlet.cli import status
from cloudlet.cli.exclusive import only_server
from cloudlet.cli.manage.command import ManageApp
from cloudlet.errors import ConflictError, UsageError
from cloudlet.service.options import Options
from cloudlet.store.database import Database, latest_version
from tests.conftest import Finished
from tests.service.certificates import certificate
from tests.service.conftest import Caller, Made, serving

COMMANDS = sorted(entry_points(group="cloudlet.manage"), key=lambda entry: entry.name)


@dataclass(frozen=True)
class Programs:
    """The installed programs, for the site of some options."""

    options: Options
    home: Path
    """Of a user who has nothing yet."""

    def __call__(self, program: str, *arguments: str | Path, stdin: bytes = b"") -> Finished:
        done = subprocess.run(
            self.argv(program, *arguments), input=stdin, env=self.environment, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    def argv(self, program: str, *arguments: str | Path) -> list[str]:
        return [str(Path(sys.executable).with_name(program)), *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OS_", "XDG_"))}
        return {**kept, "HOME": str(self.home)}

    def configure(self, **groups: dict[str, object]) -> None:
        """Write the file that both read."""
        machine = self.options.machine
        usual = {
            "cache_dir": machine.cache_dir,
            "state_dir": machine.state_dir,
            "keys_dir": machine.keys_dir,
            "hypervisor": "fake",
        }
        api = {"users_file": self.options.users_file, "listen": "127.0.0.1:0"}
        written = {"DEFAULT": usual | groups.pop("DEFAULT", {}), "api": api | groups.pop("api", {}), **groups}
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())
            for group, values in written.items()
        ]
        self.configuration.parent.mkdir(parents=True, exist_ok=True)
        self.configuration.write_text("".join(lines))

    @property
    def configuration(self) -> Path:
        return self.home / ".config" / "cloudlet" / "cloudlet.conf"

    def manage(self, *arguments: str | Path, stdin: bytes = b"") -> Finished:
        return self("cloudlet-manage", *arguments, stdin=stdin)

    def status(self) -> tuple[int, dict[str, tuple[int, str]]]:
        """The exit code of the check, which is made in this process, and what each part of it says."""
        out = io.StringIO()
        with redirect_stdout(out):
            code = status.main(["--config-file", str(self.configuration), "upgrade", "check", "--json"])
        checks = json.loads(out.getvalue())["checks"]
        return code, {each["check"]: (each["result"], each["details"]) for each in checks}


@pytest.fixture
def programs(options: Options, tmp_path: Path) -> Programs:
    found = Programs(options, tmp_path / "home")
    found.configure()
    return found


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_every_command_explains_itself(entry: EntryPoint) -> None:
    name = entry.name.replace("_", " ")
    command = entry.load()(ManageApp(), argparse.Namespace(), cmd_name=name)
    description = command.get_description()
    assert description.split("\n")[0].endswith((".", ";", ":"))
    for action in command.get_parser(f"cloudlet-manage {name}")._actions:
        assert action.help, f"{action.dest} of {name} is not explained"


def test_a_database_is_made_and_checked(programs: Programs) -> None:
    assert programs.manage("db", "version", "-f", "json").json == {
        "version": None,
        "newest": latest_version(),
    }
    assert not (programs.options.machine.state_dir / "site.sqlite").exists(), "looking has made it"
    code, checks = programs.status()
    assert (code, checks["Database"][0]) == (1, 1)
    made = programs.manage("db", "sync")
    assert (made.status, made.err) == (0, f"the database was empty, is at version {latest_version()}\n")
    assert programs.manage("-q", "db", "sync") == Finished(0, "", "")
    code, checks = programs.status()
    assert code == 0, checks
    assert programs.manage("blobs", "verify", "-f", "json") == Finished(0, "[]\n", "")


def test_a_database_of_a_newer_program_is_left_alone(programs: Programs) -> None:
    database = Database(programs.options.database_url)
    database.create()
    database.write(
        lambda connection: connection.execute(sa.text("UPDATE cloudlet_version SET version_num = '9'"))
    )
    database.close()
    refused = programs.manage("db", "sync")
    assert (refused.status, "newer Cloudlet" in refused.err) == (1, True)
    code, checks = programs.status()
    assert (code, checks["Database"][0]) == (2, 2)


def test_users_are_made_changed_and_removed(programs: Programs, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first password\n")
    with serving(programs.options) as running:
        nina = running.call.as_(None)
        new = programs.manage(
            "user", "set", "nina", "--project", "shop", "--role", "reader", "--password-file", file
        )
        assert (new.status, new.out) == (0, "")
        assert basic(nina, "first password") == (200, 403)
        assert programs.manage("user", "set", "nina", "--keep-password", "--role", "publisher").status == 0
        assert basic(nina, "first password") == (200, 201)
        assert programs.manage("user", "set", "nina", stdin="zweites Paßwort\r\n".encode()).status == 0
        assert basic(nina, "first password") == (401, 401)
        assert basic(nina, "zweites Paßwort") == (200, 201)
        rows = {row["name"]: row for row in programs.manage("user", "list", "-f", "json").json}
        assert rows["nina"] == {"name": "nina", "project": "shop", "roles": "publisher"}
        assert "mia" in rows, "another user is gone"
        assert programs.manage("user", "delete", "nina").status == 0
        assert basic(nina, "zweites Paßwort") == (401, 401)
    assert programs.options.users_file.stat().st_mode & 0o777 == 0o600


def basic(who: Caller, password: str) -> tuple[int, int]:
    """What a user may do: look, and publish."""
    auth = (b"nina", password.encode())
    look = who.session.get(f"{who.url}/v1/bases", auth=auth)
    return look.status_code, who.session.post(
        f"{who.url}/v1/bases", auth=auth, json={"base": {"name": "b"}}
    ).status_code


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said"),
    [
        (["delete", "nobody"], b"", 3, "there is no user nobody"),
        (["set", "nobody", "--keep-password"], b"", 3, "there is no user nobody"),
        (["set", "nobody"], b"", 2, "1 to 72 bytes"),
        (["set", "nobody"], b"x" * 73, 2, "1 to 72 bytes"),
        (["set", "nobody"], b"two\nlines", 2, "one line"),
        (["set", "nobody"], b"\xff", 2, "not UTF-8"),
        (["set", "nobody", "--password-file", "/no/such/file"], b"", 3, "/no/such/file"),
        (["set", "a:b"], b"password", 2, "no spaces, colons"),
        (["set", "#a", "--role", "b"], b"password", 2, "no # at"),
    ],
)
def test_what_cannot_be_a_user_is_refused(
    programs: Programs, arguments: list[str], stdin: bytes, code: int, said: str
) -> None:
    before = programs.options.users_file.read_text()
    done = programs.manage("user", *arguments, stdin=stdin)
    assert (done.status, done.out) == (code, "")
    assert said in done.err
    assert programs.options.users_file.read_text() == before


def test_a_terminal_is_asked_twice(programs: Programs) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        programs.argv("cloudlet-manage", "user", "set", "nina"), env=programs.environment, stdin=theirs,
        stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    for prompt in (b"Password: ", b"Again: "):
        while prompt not in said:
            said += os.read(ours, 4096)
        os.write(ours, b"what was typed\n")
    assert process.wait(60) == 0
    os.close(ours)
    assert b"what was typed" not in said
    assert "nina" in [user.name for user in read_users(programs.options.users_file)]


def test_damaged_and_missing_blobs_are_listed(programs: Programs, made: Made) -> None:
    with serving(programs.options) as running:
        app = running.call.publish(made.overlay)
    (blob,) = programs.options.blobs_dir.glob("??/*")
    orphan = blob.with_name("0" * 64)
    orphan.write_bytes(b"left by a crash")
    assert [row["what"] for row in verified(programs, 0)] == ["not in the database"]
    blob.chmod(0o600)
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    held = f"overlay:{app['components'][0]['overlay_id']}"
    assert verified(programs, 7)[0] == {"digest": blob.name, "what": "damaged", "held by": held}
    blob.unlink()
    assert verified(programs, 7)[0] == {"digest": blob.name, "what": "missing", "held by": held}
    with only_server(programs.options.machine.state_dir):
        refused = programs.manage("blobs", "reap")
    assert (refused.status, orphan.exists()) == (5, True)
    assert programs.manage("blobs", "reap").err == "1 files were removed\n"
    assert not orphan.exists()


def verified(programs: Programs, code: int) -> list[dict[str, str]]:
    done = programs.manage("blobs", "verify", "-f", "json")
    assert done.status == code, done.err
    assert ("damaged or missing" in done.err) == bool(code)
    return done.json


def test_who_serves_does_not_disturb_who_serves(tmp_path: Path) -> None:
    with only_server(tmp_path), pytest.raises(ConflictError), only_server(tmp_path):
        pass
    with only_server(tmp_path):
        pass


def test_the_sample_settings_are_all_settings(programs: Programs, tmp_path: Path) -> None:
    sample = programs.manage("config", "sample").out
    for group, options in settings.list_opts():
        assert f"[{group}]" in sample
        for option in options:
            assert re.search(rf"^#{option.name} =", sample, re.MULTILINE), option.name
    assert "#www_authenticate_uri = " in sample
    given = re.sub(r"^#(\w+ = (?!<None>).*)$", r"\1", sample, flags=re.MULTILINE)
    (tmp_path / "all.conf").write_text(given)
    assert settings.read_files(str(tmp_path / "all.conf")).work.keep_days == 30


def test_the_sample_policy_is_the_policy(programs: Programs, tmp_path: Path) -> None:
    sample = programs.manage("policy", "sample").out
    file = tmp_path / "policy.yaml"
    file.write_text(re.sub(r'^#"', '"', sample, flags=re.MULTILINE))
    assert Policy(TABLE, file).unknown() == []
    for rule in list_rules():
        assert f'"{rule.name}": ' in sample


@pytest.mark.parametrize(
    "text",
    ["a: [", "- a list\n", "'cloudlet:bases:list': 7\n", "'cloudlet:bases:list': 'rule:nobody'\n",
     "'admin': 'rule:publisher'\n", None],
)  # fmt: skip
def test_a_policy_that_cannot_be_understood_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=r"^policy_file: "):
        Policy(TABLE, file)


def test_what_is_wrong_is_told_before_serving(programs: Programs, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("'cloudlet:no:such': 'role:admin'\n")
    programs.configure(
        DEFAULT={"hypervisor": "qemu", "qemu_binary": "no-such-qemu", "cache_dir": policy / "cache"},
        api={"auth_strategy": "keystone", "policy_file": policy},
        keystone_authtoken={"auth_type": "password"},
    )
    code, checks = programs.status()
    assert code == 2
    assert checks["Settings"][0] == 0
    assert checks["Who may call"] == (2, checks["Who may call"][1])
    assert "auth_url" in checks["Who may call"][1]
    assert str(policy) in checks["Folders"][1]
    assert "no-such-qemu is not installed" in checks["Hypervisor"][1]
    assert checks["Policy"][0] == 1
    assert "cloudlet:no:such" in checks["Policy"][1]
    (entry,) = entry_points(group="console_scripts", name="cloudlet-status")
    assert entry.load() is status.main


def test_a_certificate_is_looked_at(programs: Programs, tmp_path: Path) -> None:
    assert programs.status()[1]["Certificate"][0] == 0
    programs.configure(api={"listen": "0.0.0.0:8790"})
    checks = programs.status()[1]
    code, said = checks["Certificate"]
    assert (code, "on their way" in said) == (1, True)
    assert checks["Settings"][0] == 1
    programs.configure(api={"listen": "0.0.0.0:8790", "publish_address": "127.0.0.1"})
    assert programs.status()[1]["Settings"][0] == 0
    for days, expected, word in ((90, 0, "ends at"), (3, 1, "ends at"), (-1, 1, "ended at")):
        shown, key = certificate(tmp_path, days=days)
        programs.configure(api={"tls_certificate": shown, "tls_key": key})
        code, said = programs.status()[1]["Certificate"]
        assert (code, word in said) == (expected, True), said
    key.write_text("nonsense")
    code, said = programs.status()[1]["Certificate"]
    assert (code, "are not a certificate and its key" in said) == (2, True)


def test_settings_that_cannot_be_read_fail_every_check(
    programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.configure(api={"auth_strategy": "noauth"})
    code, checks = programs.status()
    assert (code, {result for result, _ in checks.values()}) == (2, {2})
    programs.configuration.write_text("no section\n")
    assert status.main(["--config-file", str(programs.configuration), "upgrade", "check"]) == 255
    assert capsys.readouterr().err.startswith("cloudlet-status: ")
