"""First answers: the moment at which a guest has answered a request rightly, by the same question everywhere.

A question is a function that asks once and raises if the answer is not the right one. What is measured
ends when the right answer has been read to its end.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.guests.reference.model import model
from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import Instance

REFERENCE = Path(__file__).parent / "guests" / "reference"
REFERENCE_PORT = 9090
_PIECE = 64 << 10
_TRY_SECONDS, _PAUSE = 1.0, 0.01
"""A guest whose network is up refuses at once while its application is not; before that a try is lost."""

Question = Callable[[str, float], None]
"""Asks at a URL, with a time limit in seconds."""


class Reference:
    """Asks the reference application: at places of the model that it cannot foresee, or at one."""

    def __init__(self, mib: int, seed: int) -> None:
        self._model = reference_model(mib)
        self._digest = hashlib.sha256(self._model).hexdigest()
        self._random = random.Random(seed)

    def __call__(self, url: str, timeout: float = _TRY_SECONDS) -> None:
        self.at(self._random.randrange(len(self._model) - _PIECE), url, timeout)

    def at(self, at: int, url: str, timeout: float = _TRY_SECONDS) -> None:
        """Ask at a place."""
        answer = _get(f"{url}/answer?at={at}", timeout)
        piece = hashlib.sha256(self._model[at : at + _PIECE]).hexdigest()
        if answer["digest"] != self._digest or answer["pieces"] != [piece, piece]:
            raise FailedError(f"the reference application answers wrongly: {answer}")

    def whole(self, url: str) -> None:
        """Both copies of the model, byte for byte."""
        if _get(f"{url}/digest", 60.0)["digests"] != [self._digest] * 2:
            raise FailedError("the reference application's memory is not what it was")


@cache
def reference_model(mib: int) -> bytes:
    """The model that the application holds."""
    return model(mib)


def url_of(instance: Instance) -> str:
    """Where the guest's first port is published."""
    return instance.endpoints[0].url


def wait_answer(instance: Instance, ask: Question, seconds: float = 300.0) -> None:
    """Ask again and again, until the answer is right.

    :raises FailedError: it is not within so many seconds, or the machine ended.
    """
    deadline = time.monotonic() + seconds
    url = url_of(instance)
    while time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException):
            ask(url, _TRY_SECONDS)
            return
        if instance.wait(_PAUSE):
            raise FailedError("the machine ended before it answered")
    raise FailedError(f"no answer within {seconds:.0f} s")


def wait_agent(instance: Instance, seconds: float = 300.0) -> None:
    """Wait for the answer of the guest's agent: a program of the guest's own, with no network between."""
    agent = instance.agent
    assert agent
    # What is sent before the agent listens waits in the channel, so this is one question.
    if not agent.ping(seconds):
        raise FailedError(f"the guest's agent does not answer within {seconds:.0f} s")


def _get(url: str, timeout: float) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        document: dict[str, Any] = json.load(answer)
        return document
