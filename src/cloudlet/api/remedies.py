"""What to do about each code of an error: ``docs/troubleshooting.md`` is made of this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do about a code."""

    caller: str
    operator: str = ""
    """Of the site; empty where it is nothing of theirs."""


REMEDIES: Mapping[str, Remedy] = {
    "unauthenticated": Remedy(
        "Send the name and the password, or a token of Keystone: `--user` and `--password-file`, or "
        "`OS_CLOUD`.",
        "`cloudlet-manage user list` shows who is known. With Keystone: is the token for a project, and can"
        " the site reach Keystone?",
    ),
    "clock": Remedy(
        "It is what cloudlets say to each other: the caller corrects its tokens by the `Date` of the answer, "
        "and calls again.",
        "If hand-offs work, nothing. Have both machines' clocks set (`timedatectl`) all the same.",
    ),
    "refused": Remedy(
        "You are known, but may not do this: ask the operator for the role.",
        "The rule that decides is in `docs/reference/policy.md`; `cloudlet-manage user set NAME --role "
        "ROLE` gives the role, `policy_file` changes the rule.",
    ),
    "not_found": Remedy(
        "It is not there, or is not yours: what you may not see is not there for you. List what there is.",
    ),
    "no_such_path": Remedy(
        "The URL is wrong, or the client is of another version. `GET /` tells the versions.",
    ),
    "method": Remedy("The URL is right, the method is not: `Allow` in the answer names those that are."),
    "not_acceptable": Remedy(
        "Ask for a version between the two that the answer names, or for none.",
        "A client is newer than the site: upgrade the site.",
    ),
    "invalid": Remedy(
        "The detail names the member that is wrong, and what is right.",
    ),
    "impossible": Remedy(
        "Each member is as it should be, but it cannot be so: the detail says why. A URL that leads to an "
        "address which is not public is among these.",
        "`[api] fetch_networks` and `[webhooks] allowed_networks` allow networks that URLs may lead to.",
    ),
    "range": Remedy("The file is shorter than that: `Content-Range` in the answer says how long it is."),
    "conflict": Remedy(
        "It cannot be done in the present state, which the detail names: look at it again, wait for the "
        "operation that runs (`cloudlet operation list --state running`), or delete what is in the way.",
    ),
    "unconfirmed": Remedy(
        "Compare the fingerprint that the detail shows with what the other site's operator says, and send it "
        "along: `cloudlet peer add URL --fingerprint FINGERPRINT`. Nothing was trusted yet.",
    ),
    "changed": Remedy("Somebody has changed it since: get it again, and look whether you still want this."),
    "too_large": Remedy(
        "Send less. Of uploads: delete overlays of the project that nobody needs.",
        "`[limits] project_upload_mib` and `base_upload_mib`; `[api] most_body_kib` for what is no upload.",
    ),
    "no_capacity": Remedy(
        "The site is full; the detail says of what. Try again after `Retry-After`, at another site, or end "
        "instances of yours.",
        "`cloudlet site show` tells what is used, `[limits]` what may be; SIGHUP has it read again. "
        "`[leases]` ends instances that nobody renews. `cloudlet instance list` as an operator lists those "
        "of all users.",
    ),
    "draining": Remedy(
        "The site takes nothing new: start it at another site. What runs goes on.",
        "The site was told to drain, or the machine is about to be shut down.",
    ),
    "busy": Remedy(
        "Try again after `Retry-After`.",
        "More clients wait or transfer at once than `[api] waiters` and `transfers` allow. Raise them, and "
        "`LimitNOFILE` of the service if it comes to that.",
    ),
    "truncated": Remedy(
        "Bytes are missing. Of an upload: send the rest from where `HEAD` says; `cloudlet overlay upload` "
        "does. Of a URL: its file is not whole.",
    ),
    "corrupt": Remedy(
        "Bytes were changed on their way or at their source: send or make it again.",
        "`cloudlet-manage blobs verify` and `cloudlet base verify` tell whether it is the site's disk.",
    ),
    "integrity": Remedy("It is no overlay, or a damaged one: send or make it again."),
    "limit": Remedy("It claims sizes beyond what the format allows: it is damaged, or not an overlay."),
    "version": Remedy(
        "It was made by another version of Cloudlet: make it again with the site's, or ask for an upgrade.",
        "Upgrade the site.",
    ),
    "signature": Remedy(
        "Sign it with a key that the site trusts (`cloudlet overlay sign`), or ask the operator to trust "
        "yours.",
        "`cloudlet key list` shows who is trusted, `cloudlet key trust NAME FILE` adds one. Trust whom you "
        "would let run a program on the machine, behind its barriers.",
    ),
    "mismatch": Remedy(
        "It is made for another base, or for another kind of machine: `cloudlet site base list` shows what "
        "is here, `cloudlet overlay show FILE` what it needs. Upload the base, or make the overlay on one "
        "of these.",
        "A base that was made under KVM does not run under TCG, nor the other way round.",
    ),
    "unreachable": Remedy(
        "Nobody answers at the URL that you gave, as the site sees it: check it.",
        "Try the URL from the site's machine: its name server, proxy (`http_proxy`) and firewall are what "
        "counts.",
    ),
    "failed": Remedy(
        "It was tried and did not succeed: the detail says why. Try it again; if it stays, tell the "
        "operator the id of the request or of the operation.",
        "See the log under that id, and in `STATE_DIR/keepers/ID` and `STATE_DIR/instances/ID` what keeper "
        "and machine said while they are there. Often the machine lacks memory or disk.",
    ),
    "defect": Remedy(
        "Our mistake: report it with the id of the request.",
        "The log has a traceback under that id: please report it.",
    ),
}
"""By the last part of the code."""
