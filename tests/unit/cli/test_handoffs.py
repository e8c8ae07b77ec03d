"""What is wrong in a command line about hand-offs and peers is said before a site is asked."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cloudlet.api.schemas.handoffs import HandoffCreate
from cloudlet.api.schemas.site import Drain
from cloudlet.cli.app import main
from cloudlet.cli.manage.suspend import _instances
from cloudlet.errors import ExitCode

NOWHERE = "unix:/nonexistent"
HAND_OFF = ("handoff", "create", "hello", "edge-2")
NUMBERS = {
    "--pause": ("0.02", "60", "0.019", "61", "nan"),
    "--deadline": ("1", "86400", "0.9", "86401", "soon"),
    "--bandwidth": ("0", "1000000", "-1", "1000001", "inf"),
}
"""The least and the most of an option, and what is refused."""
MEMBERS = {"--pause": "pause_seconds", "--deadline": "deadline_seconds", "--bandwidth": "bandwidth_mbit"}


def status_of(*arguments: str) -> int:
    """How a command line ends that finds no site."""
    try:
        return main(["--site", NOWHERE, *arguments])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers_have_the_limits_of_the_site(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    least, most, *wrong = NUMBERS[option]
    wanted = {"instance_id": "0" * 8 + "-0000-4000-8000-" + "0" * 12, "peer_name": "edge-2"}
    for text in (least, most):
        assert status_of(*HAND_OFF, option, text) == ExitCode.FAILED
        assert "no cloudlet answers" in capsys.readouterr().err
        HandoffCreate.model_validate({**wanted, MEMBERS[option]: float(text)})
    for text in wrong:
        assert status_of(*HAND_OFF, f"{option}={text}") == ExitCode.USAGE
        assert f"argument {option}: " in capsys.readouterr().err
        if text != "soon":
            with pytest.raises(ValidationError):
                HandoffCreate.model_validate({**wanted, MEMBERS[option]: float(text)})


def test_a_drain_has_the_limits_of_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    for option, member, text in (("--deadline", "deadline_seconds", "-1"), ("--pause", "pause_seconds", "0")):
        assert status_of("drain", f"{option}={text}") == ExitCode.USAGE
        assert f"argument {option}: " in capsys.readouterr().err
        with pytest.raises(ValidationError):
            Drain.model_validate({member: float(text)})
    assert status_of("drain", "--deadline", "0") == ExitCode.FAILED, "which is a deadline"


def test_an_early_switch_cannot_be_verified_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(*HAND_OFF, "--switch", "early", "--verify", "full") == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "cloudlet: --verify full needs all memory before the switch: leave one of the two out\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "http://x:1"), "a peer's URL begins with https://"),
        (("set", "x", "--url", "x:1"), "a peer's URL begins with https://"),
        (("add", "https://x", "--fingerprint", "12:34"), "a fingerprint is 64 hexadecimal digits, in pairs"),
        (("add", "https://x", "--fingerprint", "g" * 64), "a fingerprint is 64 hexadecimal digits, in pairs"),
    ],
)
def test_what_is_no_peer(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("peer", *arguments) == ExitCode.USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("written", ["ab" * 32, ":".join(["ab"] * 32), ":".join(["ABab"] * 16)])
def test_fingerprints_as_people_write_them(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("peer", "add", "https://x", "--fingerprint", written) == ExitCode.FAILED
    assert "no cloudlet answers" in capsys.readouterr().err


def test_one_instance_is_and_two_are() -> None:
    assert _instances(1, "is", "are") == "1 instance is"
    assert _instances(2, "is", "are") == "2 instances are"
