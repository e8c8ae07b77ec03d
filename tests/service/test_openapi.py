"""The document of the API: valid, complete, and true of what the site answers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from cloudlet.api import openapi
from cloudlet.api.table import TABLE
from tests.service.conftest import PASSWORD, Made, Running, make, options_in, serving

SCHEMATHESIS = Path(__file__).parents[2] / ".venv" / "bin" / "st"
SEED = "20240605"
WAITS = ("--request-timeout", "75", "--max-response-time", "75")
"""Longer than a client may ask to wait for the end of an operation."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base of its own: who tries everything deletes it."""
    return make(tmp_path_factory.mktemp("explored"))


@pytest.fixture(scope="module")
def running(made: Made, hashed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(options_in(tmp_path_factory.mktemp("site"), made, hashed)) as running:
        yield running


def explore(folder: Path, url: str, persona: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Have schemathesis try all operations as somebody, with all checks; it leaves its notes in a folder."""
    command = [str(SCHEMATHESIS), "--config-file", str(Path(__file__).with_name("schemathesis.toml")), "run"]
    who = ["--auth", f"{persona}:{PASSWORD}"] if persona else []
    return subprocess.run(
        [*command, f"{url}/v1/openapi.json", "--checks", "all", "--seed", SEED, *WAITS, *who, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


def test_the_document_is_valid(running: Running) -> None:
    document = running.call.get("/v1/openapi.json")
    validate(document, cls=OpenAPIV31SpecValidator)
    assert document["openapi"] == "3.1.0"
    assert document == openapi.document(TABLE)


def test_every_row_is_described(running: Running) -> None:
    document = running.call.get("/v1/openapi.json")
    for row in TABLE:
        described = document["paths"][row.path][row.method.lower()]
        assert described["summary"], row.name
        assert described["operationId"] == row.name
        assert described["x-policy-rule"] == row.rule
        assert str(row.status) in described["responses"]
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_what_is_answered_is_what_is_documented(running: Running, made: Made, tmp_path: Path) -> None:
    running.call.publish(made.overlay)
    done = explore(tmp_path, running.call.url, "root", "--phases", "fuzzing", "--max-examples", "3")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]


def test_nobody_is_told_nothing(running: Running, tmp_path: Path) -> None:
    done = explore(tmp_path, running.call.url, None, "--phases", "fuzzing", "--max-examples", "1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
