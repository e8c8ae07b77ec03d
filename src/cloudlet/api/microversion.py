"""Which version of the wire a caller speaks: OpenStack's microversions.

The header is ``OpenStack-API-Version: cloudlet 1.N``. Without it the caller means 1.0; ``latest`` is allowed.
Source: https://specs.openstack.org/openstack/api-sig/guidelines/microversion_specification.html
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from cloudlet.api.faults import NotAcceptableError

HEADER = "OpenStack-API-Version"
SERVICE_TYPE = "cloudlet"


class Version(NamedTuple):
    """A microversion."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @classmethod
    def of(cls, header: str | None) -> Self:
        """The version that a request asks for.

        :raises NotAcceptableError: there is none such.
        """
        for part in (header or "").split(","):
            service, _, wanted = part.strip().partition(" ")
            if service.lower() != SERVICE_TYPE:
                continue
            if wanted.strip().lower() == "latest":
                return cls(*MAX)
            match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", wanted.strip())
            version = cls(int(match[1]), int(match[2])) if match else None
            if version is None or not MIN <= version <= MAX:
                raise NotAcceptableError(
                    f"version {wanted.strip()!r} is not between {MIN} and {MAX}",
                    hint="ask for one of them, or for latest",
                )
            return version
        return cls(*MIN)


MIN = Version(1, 0)
MAX = Version(1, 0)
"""A change of what callers see gets the next number here, and a line in the reference."""
