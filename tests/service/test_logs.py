"""The log of a server, as its settings say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.service.conftest import Made
from tests.service.served import serve_command, served, settings_file


def test_lines_of_json_in_a_file(tmp_path: Path, made: Made, hashed: str) -> None:
    file = tmp_path / "cloudlet.json"
    settings = settings_file(tmp_path, made, hashed, DEFAULT={"log_file": file, "use_json": True})
    with served(settings) as server:
        answer = server.call("GET", "/v1/instances")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    wanted = answer.headers["X-Openstack-Request-Id"]
    (line,) = [line for line in lines if wanted in json.dumps(line)]
    assert (line["levelname"], line["name"]) == ("INFO", "cloudlet.api.dispatch")
    assert wanted not in server.log.read_text(), "not on standard error too"


def test_a_log_that_cannot_be(tmp_path: Path, made: Made, hashed: str) -> None:
    settings = settings_file(tmp_path, made, hashed, DEFAULT={"use_json": "perhaps"})
    done = subprocess.run(serve_command(settings), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "use_json: Invalid Boolean value: perhaps" in done.stderr
