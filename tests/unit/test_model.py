from __future__ import annotations

import pytest

from cloudlet.errors import UsageError
from cloudlet.model import Readiness, parse_rate, parse_size


@pytest.mark.parametrize("text", ["agent", "tcp:22", "http:8080/", "http:8080/a?b", "serial:login: $"])
def test_a_rule_is_written_as_it_is_read(text: str) -> None:
    assert str(Readiness.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "serial:a{99999999999}",
        "serial:\\u0041b",
        "serial:(?u)a",
        "serial:" + "(" * 5000,
        "serial:((",
        "serial:\udc80",
        "serial:",
        "tcp:" + "9" * 5000,
        "tcp:\u0668\u0660",
        "tcp:0",
        "http:65536/",
        "agent:1",
    ],
)
def test_a_rule_that_could_not_be_asked_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Readiness.parse(text)


@pytest.mark.parametrize(
    ("text", "count"), [("512M", 512 << 20), ("8G", 8 << 30), ("1 kib", 1024), ("0", 0), ("3TB", 3 << 40)]
)
def test_a_size(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "9" * 5000, "8 gigabytes"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(("text", "per_second"), [("10M", 1.25e6), ("1.6k", 200.0), ("8", 1.0)])
def test_a_rate(text: str, per_second: float) -> None:
    assert parse_rate(text) == per_second


@pytest.mark.parametrize("text", ["", "0", "0.0M", "-1M", "1e3", "9" * 5000])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rate(text)
