"""Clones are made unique: a synthesised machine gets an identity of its own.

The VM generation ID changes with every resume, and the guest's kernel reseeds its random numbers by
itself. The rest is the guest's: clock, host name, machine id, SSH host keys. A guest we built has a
clone agent that does it in one call; another with a guest agent is told step by step; one without
cannot be told, which ``base show`` says.
"""

from __future__ import annotations

import shlex
import time

from cloudlet.errors import FailedError
from cloudlet.hypervisor.driver import GuestAgent
from cloudlet.store.bases import Guest

CLONE_AGENT = "/usr/lib/cloudlet/clone-agent"
_SECONDS = 30.0

_STEP_BY_STEP = r"""
status=0
failed() { echo "cloudlet: $1" >&2; status=1; }
# The date of some systems takes whole seconds only, and busybox's is content where the kernel refused.
seconds=${1%.*}
date -u -s "@$1" >/dev/null 2>&1 || date -u -s "@$seconds" >/dev/null 2>&1
now=$(date -u +%s)
{ [ "$now" -ge "$((seconds - 1))" ] && [ "$now" -le "$((seconds + 60))" ]; } ||
  failed "the clock could not be set"
hostname "$2" 2>/dev/null || echo "$2" > /proc/sys/kernel/hostname || failed "the host name could not be set"
echo "$2" > /etc/hostname || failed "/etc/hostname could not be written"
if [ -s /etc/machine-id ]; then
  id=$(tr -d - < /proc/sys/kernel/random/uuid)
  { [ "${#id}" -eq 32 ] && echo "$id" > /etc/machine-id; } || failed "/etc/machine-id could not be renewed"
fi
if command -v ssh-keygen >/dev/null 2>&1 && [ -d /etc/ssh ]; then
  rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub &&
    ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key >/dev/null </dev/null ||
    failed "the SSH host key could not be renewed"
  pkill -HUP -x sshd 2>/dev/null
fi
exit "$status"
"""
"""What a guest lacks (a machine id, SSH) is no failure; what it has and keeps is: clones would share it."""


def renew(agent: GuestAgent | None, guest: Guest, host_name: str) -> float | None:
    """Give a clone its own identity; the seconds it took, or None where nobody in the guest can do it.

    :raises FailedError: the guest's agent is there and fails.
    """
    if agent is None or not guest.agent:
        return None
    began = time.monotonic()
    now = f"{time.time():.3f}"
    if guest.clone_agent:
        argv = [CLONE_AGENT, "--epoch", now, "--hostname", host_name]
    else:
        argv = ["/bin/sh", "-c", _STEP_BY_STEP, "cloudlet-clone", now, host_name]
    status, output = agent.run(argv, timeout=_SECONDS)
    if status:
        text = output.decode(errors="replace").strip()[-200:]
        raise FailedError(
            f"the clone could not renew its identity: {shlex.join(argv[:1])} gave {status}: {text}"
        )
    return time.monotonic() - began


def set_clock(agent: GuestAgent | None, guest: Guest) -> None:
    """Have a machine that stood still know what time it is; it is the same machine, and keeps the rest.

    :raises FailedError: the guest's agent is there and fails.
    """
    if agent is None or not guest.agent:
        return
    status, output = agent.run(["date", "-u", "-s", f"@{time.time():.3f}"], timeout=_SECONDS)
    if status:
        # The date of some systems takes whole seconds only.
        status, output = agent.run(["date", "-u", "-s", f"@{time.time():.0f}"], timeout=_SECONDS)
    if status:
        text = output.decode(errors="replace").strip()[-200:]
        raise FailedError(f"the machine's clock could not be set: {text}")


def host_name(app: str, instance: str) -> str:
    """A host name for a clone: the app's name and the instance's id, as RFC 1123 wants it."""
    plain = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in app.lower())
    return f"{plain.strip('-')[:40] or 'cloudlet'}-{instance}"
