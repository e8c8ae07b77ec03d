"""The VM generation ID: by a new one, a guest notices that it is a copy; by the old one, that it is not."""

from __future__ import annotations

from uuid import UUID

from cloudlet.errors import UsageError


def read_generation_id(text: str) -> UUID | None:
    """The generation ID that another site gave for a machine; None where it gave none.

    :raises UsageError: it is not a UUID. It may be anything: it is another site's word.
    """
    if not text:
        return None
    try:
        return UUID(text)
    except ValueError as error:
        raise UsageError(f"{text[:80]!r} is not a VM generation ID", hint="it is a UUID") from error
