"""How Sphinx builds this documentation.

Run from the top of the checkout: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.
Pages are Markdown (MyST). Release notes are read by reno from the Git history, so the build needs a
clone with at least one commit, not an unpacked archive. Nothing is fetched from the network while
building. Reference pages hold a line ``<!-- generated: NAME -->`` that becomes a table made from the
code, so they cannot say anything else than the program; commands come from cliff's own extension.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from cloudlet import errors, settings
from cloudlet.api import faults
from cloudlet.api.remedies import REMEDIES
from cloudlet.api.table import TABLE, list_rules
from cloudlet.control import recipe

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_METADATA = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))

project = "Cloudlet"
copyright = "the Cloudlet contributors, Apache License 2.0"  # noqa: A001 (Sphinx gives the name)
release = version = _METADATA["project"]["version"]

extensions = ["myst_parser", "reno.sphinxext", "cliff.sphinxext"]
myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results/raw"]

autoprogram_cliff_application = "cloudlet"
# How a table is printed is the same for every command that prints one: said once, not ten times.
autoprogram_cliff_ignored = [
    *("--help", "--max-width", "--fit-width", "--print-empty", "--noindent", "--quote", "--prefix"),
    *("--sort-ascending", "--sort-descending", "--sort-column"),
]

# Every reference must resolve; with -W a broken one ends the build.
nitpicky = True

# Options are typed with two hyphens, also where the text comes from a docstring.
smartquotes = False

html_theme = "furo"
html_title = "Cloudlet"
html_copy_source = False


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(*head: str) -> Iterator[str]:
    yield _row(*head)
    yield _row(*("---" for _ in head))


def _settings() -> Iterator[str]:
    for group, options in settings.GROUPS.items():
        yield from ("", f"## [{group}]", "")
        yield from _table("Option", "Environment", "Default", "Meaning")
        for option in options:
            default = "" if option.default is None else f"`{option.default}`"
            variable = f"OS_{group.upper()}__{option.name.upper()}"
            yield _row(f"`{option.name}`", f"`{variable}`", default, option.help)


def _kinds(error: type[errors.CloudletError]) -> Iterator[type[errors.CloudletError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _kinds(kind)


def _exit_codes() -> Iterator[str]:
    yield from _table("Code", "Name", "When")
    kinds = list(_kinds(errors.CloudletError))[1:]
    apart = {
        errors.ExitCode.DONE: "The command did what was asked.",
        errors.ExitCode.INTERRUPTED: "It was told to end: Ctrl-C, SIGTERM or SIGHUP. Nothing is left.",
    }
    for code in errors.ExitCode:
        said = [" ".join(str(kind.__doc__).split()) for kind in kinds if kind.exit_code == code]
        yield _row(f"`{int(code)}`", code.name.lower().replace("_", " "), apart.get(code, " ".join(said)))


def _type_of(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "items" in schema:
        return f"list of {_type_of(schema['items'])}"
    limits = [
        f"{name} `{schema[key]}`"
        for key, name in (("pattern", "like"), ("minimum", "at least"), ("maximum", "at most"))
        if key in schema
    ]
    if "maxLength" in schema:
        limits.append(f"at most `{schema['maxLength']}` characters")
    return ", ".join([str(schema.get("type", "")), *limits])


def _recipe() -> Iterator[str]:
    schema = recipe.schema()
    parts = {"Recipe": schema, **schema["$defs"]}
    for name, part in parts.items():
        yield from ("", f"## {name}", "", " ".join(part.get("description", "").split()), "")
        if "enum" in part:
            yield "One of " + ", ".join(f"`{value}`" for value in part["enum"]) + "."
            continue
        yield from _table("Key", "Value", "Needed", "Default", "Meaning")
        for key, value in part["properties"].items():
            needed = "yes" if key in part.get("required", ()) else ""
            default = f"`{value['default']!r}`" if value.get("default") not in (None, "", []) else ""
            yield _row(f"`{key}`", _type_of(value), needed, default, value.get("description", ""))


def _operations() -> Iterator[str]:
    for noun in dict.fromkeys(row.noun for row in TABLE):
        yield from ("", f"## {noun}", "")
        yield from _table("Request", "What it does", "Who may", "Good answers")
        for row in (row for row in TABLE if row.noun == noun):
            answers = ", ".join(str(status) for status in (row.status, *row.statuses))
            who = row.check.removeprefix("rule:")
            yield _row(f"`{row.method} {row.path}`", row.summary, who, answers)


def _faults() -> Iterator[str]:
    yield from _table("Code", "Status", "When")
    for kind, fault in faults.FAULTS.items():
        meaning = " ".join(str(kind.__doc__).split())
        yield _row(f"`cloudlet.NOUN.{fault.reason}`", str(fault.status), meaning)
    yield _row(f"`cloudlet.NOUN.{faults.DEFECT.reason}`", "500", "Our mistake: please report it.")


def _remedies() -> Iterator[str]:
    yield from _table("Code", "Status", "Who sees it", "Who runs the site")
    for fault in (*faults.FAULTS.values(), faults.DEFECT):
        remedy = REMEDIES[fault.reason]
        yield _row(f"`{fault.reason}`", str(fault.status), remedy.caller, remedy.operator)


def _policy() -> Iterator[str]:
    yield from _table("Rule", "Who", "What")
    for rule in list_rules():
        yield _row(f"`{rule.name}`", f"`{rule.check_str}`", str(rule.description))


_GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "faults": _faults,
    "remedies": _remedies,
    "operations": _operations,
    "policy": _policy,
    "settings": _settings,
    "exit-codes": _exit_codes,
    "recipe": _recipe,
}


def _fill(_app: Sphinx, _page: str, source: list[str]) -> None:
    source[0] = re.sub(
        r"<!-- generated: ([a-z-]+) -->", lambda match: "\n".join(_GENERATED[match[1]]()), source[0]
    )


def setup(app: Sphinx) -> None:
    """Sphinx's hook: fill in what the code says."""
    app.connect("source-read", _fill)
