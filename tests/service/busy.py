"""An app on a real machine that changes more memory than a thin link carries: what an early switch is for."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError

RECIPE = """\
name: busy
files: [{from: files/, to: /www/hello/}]
run:
  - dd if=/dev/urandom of=/run/cold bs=64k count=64 2>/dev/null
  - ln -s /run/cold /www/cold
  - ln -s /run/turn /www/turn
  - |
    mkdir -p /www/cgi-bin
    {
      echo '#!/bin/sh'
      echo 'echo "Content-Type: text/plain"; echo'
      echo '(turn=0; while true; do'
      echo '  dd if=/dev/urandom of=/run/busy bs=64k count=16 seek=$((turn % 12 * 16)) conv=notrunc'
      echo '  turn=$((turn + 1)); echo $turn > /run/turn.new; mv /run/turn.new /run/turn'
      echo 'done) </dev/null >/dev/null 2>&1 &'
    } > /www/cgi-bin/busy
    chmod +x /www/cgi-bin/busy
ports: [{port: 8080}]
ready: http:8080/
"""
"""An app that writes to 12 MiB of its memory again and again once it is asked to, as fast as it can."""
TURNS = 12
"""After so many it has written to all of them."""
TERMS = {"switch": "early", "overlay": "overlay", "bandwidth_mbit": 30, "deadline_seconds": 2}
"""How it is handed off."""


def get(instance: Mapping[str, Any], path: str) -> bytes:
    """What it answers."""
    with urllib.request.urlopen(instance["endpoints"][0]["url"] + path, timeout=60) as answer:
        return bytes(answer.read())


def begin(instance: Mapping[str, Any]) -> None:
    """Have it begin to write."""
    get(instance, "/cgi-bin/busy")


def turn(instance: Mapping[str, Any]) -> int:
    """How often it has written; it never counts back."""
    try:
        return int(get(instance, "/turn") or 0)
    except HTTPError:
        return 0


def cold(instance: Mapping[str, Any]) -> bytes:
    """The digest of 4 MiB that it never changes."""
    return hashlib.sha256(get(instance, "/cold")).digest()
