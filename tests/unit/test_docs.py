"""The documentation says all that the program has, and nothing that the program does not take.

Pages under ``docs/reference`` are partly made from the code; so what must be named is looked for in
the pages that people write. Commands in fenced blocks are parsed by the program's own parser, not run.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from cloudlet import settings
from cloudlet.api import faults
from cloudlet.api.remedies import REMEDIES
from cloudlet.cli.command import CloudletApp
from cloudlet.control.recipe import Files, Port, Recipe
from cloudlet.errors import ExitCode
from cloudlet.model import Readiness

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BY_HAND = sorted(DOCS.glob("*.md"))
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
COMMANDS = sorted(point.name.replace("_", " ") for point in entry_points(group="cloudlet.commands"))
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in languages:
                yield page, text


def words(line: str) -> list[list[str]]:
    """The simple commands of a line of shell, as words; redirections are left out."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    reader.whitespace_split = True
    commands: list[list[str]] = [[]]
    target = False
    for word in reader:
        if set(word) <= set("<>"):
            target = True
        elif set(word) <= set("|&;()"):
            commands.append([])
        elif target:
            target = False
        else:
            commands[-1].append(word)
    return commands


def typed(text: str) -> Iterator[list[str]]:
    """The arguments of every ``cloudlet`` in a fenced block."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        shown = line.strip().removeprefix("$ ")
        nested = re.findall(r"\$\((cloudlet [^)]*)\)", shown)
        if not nested and not re.match(r"(\S+=\S* |sudo |\S*/)*cloudlet |.*\| *cloudlet ", shown):
            continue
        for part in [*nested, re.sub(r"\$\([^)]*\)", "VALUE", shown)]:
            for command in words(part):
                while command and ("=" in command[0] or command[0] == "sudo"):
                    command.pop(0)
                if command and command[0].rpartition("/")[2] == "cloudlet":
                    yield command[1:]


TYPED = [(page, arguments) for page, text in blocks("console", "sh", "bash") for arguments in typed(text)]


def parse(arguments: list[str]) -> str:
    """Parse as the program does; the name of the command."""
    app = CloudletApp()
    _, rest = app.parser.parse_known_args(arguments)
    factory, name, left = app.command_manager.find_command(rest)
    factory(app, None).get_parser(name).parse_args(left)
    return name


@pytest.mark.parametrize(
    ("page", "arguments"),
    TYPED,
    ids=[f"{page.relative_to(ROOT)}: {shlex.join(arguments)}" for page, arguments in TYPED],
)
def test_a_command_that_is_shown_can_be_typed(page: Path, arguments: list[str]) -> None:
    try:
        assert parse(arguments) in {*COMMANDS, "help", "complete"}, "cliff takes abbreviations, we write none"
    except SystemExit as error:
        pytest.fail(f"{page.name}: cloudlet {shlex.join(arguments)} does not parse ({error})")


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "x", "--no-such"], ["base", "build", "extra"], ["no", "such"]]
)
def test_a_wrong_command_would_be_noticed(arguments: list[str]) -> None:
    with pytest.raises((SystemExit, ValueError)):
        parse(arguments)


def test_commands_are_found_in_pipes_substitutions_and_after_prompts() -> None:
    text = """$ A=1 cloudlet ps \\
      -f json > x
    curl "$(cloudlet ps -c id)/a"
    cat x | cloudlet run - &
    ls # cloudlet"""
    assert list(typed(text)) == [["ps", "-f", "json"], ["ps", "-c", "id"], ["run", "-"]]


@cache
def shown() -> set[str]:
    """The commands that are typed on pages that people write."""
    found = set()
    for page, arguments in TYPED:
        with suppress(SystemExit, ValueError):  # another test says so
            found |= {parse(arguments)} if page in BY_HAND else set()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_shown_in_use(command: str) -> None:
    named = re.compile(rf"`cloudlet {command}\b")
    assert command in shown() or any(
        named.search(" ".join(page.read_text(encoding="utf-8").split())) for page in BY_HAND
    )


def sample() -> str:
    """The sample file of a machine's settings."""
    shown = [text for page, text in blocks("ini") if page.name == "operator.md"]
    (found,) = (text for text in shown if text.startswith("[DEFAULT]"))
    return found


@pytest.mark.parametrize("name", [option.name for option in settings.OPTIONS])
def test_every_setting_is_in_the_sample_file(name: str) -> None:
    assert re.search(rf"^{name} = ", sample(), re.MULTILINE)


def test_the_sample_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in settings.OPTIONS:
        monkeypatch.delenv(f"OS_DEFAULT__{option.name.upper()}", raising=False)
    file = tmp_path / "cloudlet.conf"
    file.write_text(sample(), encoding="utf-8")
    read = settings.load(str(file))
    assert read.state_dir == Path("/var/lib/cloudlet")
    given = dict(re.findall(r'^(\w+) = "?(.*?)"?$', sample(), re.MULTILINE))
    assert {name: str(getattr(read, name)) for name in given} == given


def test_every_code_of_an_error_has_a_remedy() -> None:
    reasons = [fault.reason for fault in (*faults.FAULTS.values(), faults.DEFECT)]
    assert len(reasons) == len(set(reasons))
    assert set(REMEDIES) == set(reasons)
    assert "<!-- generated: remedies -->" in (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def test_settings_that_remedies_name_are_there() -> None:
    named = re.findall(
        r"`\[(\w+)\] (\w+)`", " ".join(f"{one.caller} {one.operator}" for one in REMEDIES.values())
    )
    assert named
    for group, name in named:
        assert name in [option.name for option in settings.GROUPS[group]], f"[{group}] {name}"


@pytest.mark.parametrize("code", list(ExitCode))
def test_every_exit_code_is_explained_to_users(code: ExitCode) -> None:
    assert re.search(rf"^\| {int(code)} \|", (DOCS / "user.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    "key",
    [field.alias or name for part in (Recipe, Files, Port) for name, field in part.model_fields.items()],
)
def test_every_key_of_a_recipe_is_explained_to_publishers(key: str) -> None:
    table = (DOCS / "publisher.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|.*`{key}`", table, re.MULTILINE)


def test_recipes_that_are_shown_are_valid() -> None:
    shown = [yaml.safe_load(text) for _, text in blocks("yaml")]
    shown += [
        yaml.safe_load(text)
        for _, block in blocks("console")
        for text in re.findall(r"recipe\.yaml <<'EOF'\n(.*?)^EOF$", block, re.MULTILINE | re.DOTALL)
    ]
    recipes = [Recipe.model_validate(value) for value in shown]
    assert {recipe.name for recipe in recipes} >= {"planner", "hello"}


@pytest.mark.parametrize("rule", ["agent", "tcp:22", "http:8080/", "serial:login:"])
def test_every_kind_of_readiness_rule_is_shown(rule: str) -> None:
    kind = Readiness.parse(rule).kind.value
    assert re.search(rf"`{kind}[`:]", (DOCS / "publisher.md").read_text(encoding="utf-8"))
    assert re.search(rf"`{kind}[`:]", (DOCS / "operator.md").read_text(encoding="utf-8"))
