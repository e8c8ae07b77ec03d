from __future__ import annotations

import pytest

from cloudlet.errors import UsageError
from cloudlet.model import Readiness


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
