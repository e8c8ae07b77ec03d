"""Who may do what: oslo.policy, with a rule for each operation of the table and six personas.

What one may not see is not there (404); what one may see but not do is refused (403). So each noun has a rule
for seeing, and each operation one for doing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from oslo_config import cfg
from oslo_policy import opts
from oslo_policy.policy import DocumentedRuleDefault, Enforcer, InvalidDefinitionError, RuleDefault

from cloudlet.api.identity import Identity
from cloudlet.errors import NotFoundError, RefusedError, UsageError

ADMIN, PUBLISHER, MEMBER, READER = "rule:admin", "rule:publisher", "rule:member", "rule:reader"
OWNER, VISIBLE, ANYBODY, PEER = "rule:owner", "rule:visible", "rule:anybody", "rule:peer"

PERSONAS = (
    RuleDefault("admin", "role:admin", "The provider's operator: everything."),
    RuleDefault(
        "publisher", "rule:admin or role:publisher", "An application's developer: bases, overlays and apps."
    ),
    RuleDefault(
        "member", "rule:publisher or role:member", "A user: instances, and overlays saved from them."
    ),
    RuleDefault("reader", "rule:member or role:reader", "Looks, and changes nothing."),
    RuleDefault("anybody", "@", "Whoever calls, also without showing who they are."),
    RuleDefault("mine", "user_id:%(user_id)s and project_id:%(project_id)s", "Who owns it."),
    RuleDefault("owner", "rule:admin or (rule:mine and rule:member)", "Who owns it and may change things."),
    RuleDefault(
        "auditor",
        "role:reader and not role:member and project_id:%(project_id)s",
        "Who may only look sees all of the project. (Keystone gives every member the role reader too.)",
    ),
    RuleDefault(
        "peer", "role:peer", "Another cloudlet, which shows a token of its key: nobody has this role."
    ),
    RuleDefault("peers", "rule:peer and user_id:peer:%(peer_id)s", "The cloudlet with which it is shared."),
    RuleDefault(
        "visible",
        "rule:admin or rule:mine or rule:auditor or rule:peers or 'True':%(public)s",
        "Who may see it.",
    ),
)
USUAL_FILE = Path("/etc/cloudlet/policy.yaml")
_LOOK_SECONDS = 1.0
_MOST_KNOWN = 10_000


class Ruled(Protocol):
    """What a policy needs to know of an operation."""

    @property
    def rule(self) -> str: ...
    @property
    def check(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def summary(self) -> str: ...


class Policy:
    """The rules of a site.

    :param file: changes them; without it the usual one does, if it is there.
    :raises UsageError: the file is not there, or cannot be understood: nobody may do more for that.
    """

    def __init__(self, operations: Iterable[Ruled], file: Path | None = None) -> None:
        if file and not file.exists():
            raise UsageError(f"policy_file: there is no {file}", hint="write it, or leave policy_file out")
        conf = cfg.ConfigOpts()
        conf(args=[], project="cloudlet", default_config_files=[], default_config_dirs=[])
        opts._register(conf)
        conf.set_override("policy_file", str(file or USUAL_FILE), group="oslo_policy")
        conf.set_override("policy_dirs", [], group="oslo_policy")
        self._file = file or USUAL_FILE
        self._stamp: int | None = None
        self._looked = -_LOOK_SECONDS
        self._known: dict[tuple[object, ...], bool] = {}
        """What was decided: it depends on nothing else, and oslo.policy takes a millisecond each time."""
        self._enforcer = Enforcer(conf)
        self._enforcer.register_defaults([*PERSONAS, *rules(operations)])
        try:
            self._enforcer.load_rules()
            self._enforcer.check_rules(raise_on_violation=True)
        except (AttributeError, InvalidDefinitionError, OSError, TypeError, ValueError) as error:
            raise UsageError(f"policy_file: {file or USUAL_FILE}: {error}") from error

    def unknown(self) -> list[str]:
        """What the file says of operations that there are not, which is for nothing."""
        ours = self._enforcer.registered_rules
        return sorted(name for name in self._enforcer.file_rules if ":" in name and name not in ours)

    def allows(self, rule: str, who: Identity, target: Any = None) -> bool:
        """Whether somebody may do what the rule is for, with a row."""
        self._look()
        seen = _target(target, who)
        key = rule, who, *seen.values()
        if (known := self._known.get(key)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = bool(self._enforcer.enforce(rule, seen, who.credentials()))
        return known

    def _look(self) -> None:
        """Forget what was decided when the file has changed; look once a second."""
        if (now := time.monotonic()) < self._looked + _LOOK_SECONDS:
            return
        self._looked = now
        try:
            stamp = self._file.stat().st_mtime_ns
        except OSError:
            stamp = None
        if stamp != self._stamp:
            self._stamp = stamp
            self._known.clear()

    def enforce(self, operation: Ruled, who: Identity, target: Any = None, *, rows: Any = None) -> None:
        """Whether somebody may do an operation.

        :raises NotFoundError: they may not even see the row.
        :raises RefusedError: they may not do it.
        """
        if target is not None and not self.allows("visible", who, target):
            raise NotFoundError(f"there is no {rows.noun} {target.id}", hint=rows.listed_by)
        if not self.allows(operation.rule, who, target):
            raise RefusedError(
                f"{who.user_id or 'nobody'} may not do {operation.rule}",
                hint="ask the provider for the role",
            )


def rules(operations: Iterable[Ruled]) -> list[DocumentedRuleDefault]:
    """A rule for each operation."""
    return [
        DocumentedRuleDefault(
            operation.rule, operation.check, operation.summary,
            [{"path": operation.path, "method": operation.method}],
        )
        for operation in operations
    ]  # fmt: skip


def _target(row: Any, who: Identity) -> dict[str, object]:
    if row is None:  # something new, which will be the caller's
        return {"user_id": who.user_id, "project_id": who.project_id, "public": False, "peer_id": ""}
    return {
        "user_id": row.user_id,
        "project_id": row.project_id,
        "public": getattr(row, "public", False),
        "peer_id": getattr(row, "peer_id", None) or "",
    }
