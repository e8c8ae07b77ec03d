"""Other cloudlets: whom this site trusts, how it calls them, and who it is when they call.

What a peer is trusted with is in ``docs/formats/handoff.md``. A peer is pinned by its key and its id, which
an operator confirms once, by the fingerprint; where it is reached may change.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from oslo_log import log
from sqlalchemy.engine import Connection

from cloudlet.errors import (
    CloudletError,
    ConflictError,
    FailedError,
    ImpossibleError,
    SignatureError,
    UnconfirmedError,
)
from cloudlet.hypervisor.qemu.launch import find_qemu
from cloudlet.keeper.order import describe as describe_error
from cloudlet.service.underway import way_out
from cloudlet.store import journal, tables
from cloudlet.store.retries import Remember, forget
from cloudlet.store.rows import HANDOFFS, OPEN_HANDOFFS, PEERS, Owned, Peer, PeerState, now
from cloudlet.store.tokens import PeerTokens, Seen, TokenError, issuer_of, verify
from cloudlet.transfer.description import Description, check_url, grouped
from cloudlet.transfer.peer import PeerConnection, PeerError, describe

if TYPE_CHECKING:
    from cloudlet.service.site import ServedSite

LOG = log.getLogger(__name__)
Aside = Callable[[], AbstractContextManager[None]]
VERSIONS = (1,)
"""Of the hand-off protocol, those that are spoken here."""
CAPABILITIES_PATH = "/v1/peer/capabilities"
_NOT_KNOWN = "unauthenticated"
"""The reason of a peer that refuses whoever it does not trust."""
_CALL_SECONDS = 10.0
_NOTED_SECONDS = 60.0
"""Who is heard of all the time is written down so often."""
_MOST_BASES = 1000
_LINE = re.compile(r"[^\x00-\x1f\x7f]{0,255}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Peers:
    """The peers of a site."""

    def __init__(self, site: ServedSite) -> None:
        self._site = site
        self._signer = site.machine.keys.signer()
        self._seen = Seen()
        self._noted: dict[str, float] = {}
        """When it was written down last that a peer was heard of."""
        self.url = site.options.peers.url
        """Where this site is reached; who serves it says so, where the kernel has chosen the port."""
        self.tokens = PeerTokens(site.id, self._signer.private)
        self.fingerprint = self._signer.key_id.hex()
        """Of this site's key."""

    def description(self, nonce: str = "") -> Description:
        """What others are told of this site.

        :param nonce: what the asker made up.
        :raises FailedError: the certificate that is to be named cannot be read.
        """
        said: dict[str, Any] = {
            "site_id": self._site.id,
            "name": self._site.name,
            "url": self.url,
            "public_key": self._signer.public_raw,
            "certificate": _digest_of(self._site.options.peers.certificate),
            "nonce": nonce,
        }
        _, signature = self._signer(Description(**said).message)
        return Description(**said, signature=signature)

    def capabilities(self) -> dict[str, Any]:
        """What this site can do, for its peers."""
        hypervisor = self._site.machine.hypervisor
        machine = hypervisor.machine(memory_bytes=1 << 20, disk_bytes=1 << 20)
        return {
            "versions": list(VERSIONS),
            "hypervisor": hypervisor.name,
            "qemu": self._qemu,
            "accelerator": str(machine.accelerator),
            "cpu_model": machine.cpu_model,
            "bases": [base.id for base in self._site.machine.bases.all()[-_MOST_BASES:]],
        }

    def add(
        self,
        url: str,
        by: Owned,
        *,
        fingerprint: str | None,
        name: str | None = None,
        elsewhere: Aside = nullcontext,
        remember: Remember = forget,
    ) -> Peer:
        """Trust the cloudlet at a URL, if it has the key of this fingerprint.

        :param by: who wants it.
        :param fingerprint: as its operator says it; None: nothing is trusted, and the error shows it.
        :param elsewhere: entered while the peer is asked.
        :raises UnconfirmedError: there was no fingerprint.
        :raises SignatureError: the key has another one.
        :raises ConflictError: it is a peer already.
        """
        check_url(url, "peer.url")
        with elsewhere():
            found = describe(url, timeout=_CALL_SECONDS)
        if name is None and "/" in found.name:
            raise ImpossibleError(
                f"peer.name: it calls itself {found.name}; a peer's name has no slash",
                hint="give another name",
            )
        if found.site_id == self._site.id:
            raise ImpossibleError("peer.url: it leads to this site itself", hint="give another site's")
        if fingerprint is None:
            raise UnconfirmedError(
                f"{found.name} at {url} has the fingerprint {grouped(found.fingerprint)}",
                fingerprint=found.fingerprint,
                hint="compare it with what its operator says, and send it along",
            )
        if fingerprint != found.fingerprint:
            raise SignatureError(
                f"{found.name} at {url} has another fingerprint: {grouped(found.fingerprint)}",
                hint="ask its operator; somebody may stand in between",
            )
        peer = Peer(
            id=found.site_id,
            project_id=by.project_id,
            user_id=by.user_id,
            name=name or found.name,
            url=url.rstrip("/"),
            public_key=base64.b64encode(found.public_key).decode(),
            fingerprint=found.fingerprint,
            certificate=found.certificate,
        )

        def insert(connection: Connection) -> Peer:
            if known := PEERS.find(connection, id=peer.id):
                raise ConflictError(
                    f"it is a peer already: {known.name}, {peer.id}",
                    hint="if it has a new key, delete it first",
                )
            PEERS.insert(connection, peer)
            journal.emit(connection, "peer", peer.state, peer, name=peer.name, fingerprint=peer.fingerprint)
            remember(connection, peer.id)
            return peer

        made = self._site.database.write(insert)
        LOG.info("%s is a peer: %s at %s", made.id, made.name, made.url)
        return self.refresh(made, elsewhere=elsewhere)

    def update(
        self,
        peer: Peer,
        *,
        name: str | None = None,
        url: str | None = None,
        state: PeerState | None = None,
        elsewhere: Aside = nullcontext,
    ) -> Peer:
        """Change what a peer is called, where it is reached, or whether it is dealt with.

        :param url: it has to be there: it is asked.
        :raises IntegrityError: another one is there.
        :raises UnreachableError: nobody is there.
        """
        changes: dict[str, Any] = {"name": name, "url": url, "state": state}
        if url is not None:
            changes |= self._found_at(url, peer, elsewhere)
        given = {column: value for column, value in changes.items() if value is not None}

        def change(connection: Connection) -> Peer:
            before = PEERS.get(connection, peer.id, lock=True)
            after = PEERS.update(connection, peer.id, **given)
            if after.state is not before.state:
                journal.emit(connection, "peer", after.state, after, name=after.name)
            return after

        after = self._site.database.write(change)
        if after.url != peer.url:
            self._tell_where(after)
        return after

    def whom(self, peer: Peer) -> dict[str, str]:
        """A peer as a keeper is told of it, and who asks it."""
        return {"own_id": self._site.id, "id": peer.id, "url": peer.url, "public_key": peer.public_key}

    def _tell_where(self, peer: Peer) -> None:
        """Have those who are amid a hand-off with a peer ask it where it is now."""
        for handoff in self._site.database.read(
            lambda connection: HANDOFFS.list(connection, peer_id=peer.id, state=OPEN_HANDOFFS)
        ):
            with suppress(CloudletError):  # its keeper is gone: whoever asks instead reads it in the row
                self._site.keeping.keepers.ask(
                    handoff.instance_id,
                    "find",
                    handoff=handoff.id,
                    peer=self.whom(peer),
                    timeout=_CALL_SECONDS,
                )

    def delete(self, peer: Peer) -> None:
        """Forget a peer, and its key.

        :raises ConflictError: an instance is on its way there, or from there.
        """

        def remove(connection: Connection) -> None:
            for open_ in HANDOFFS.list(connection, peer_id=peer.id, state=OPEN_HANDOFFS, limit=1):
                raise ConflictError(
                    f"hand-off {open_.id} with it is {open_.state}",
                    hint=way_out(open_),
                )
            if PEERS.delete(connection, peer.id):
                journal.emit(connection, "peer", "deleted", peer, name=peer.name)

        self._site.database.write(remove)

    def connection(self, peer: Peer) -> PeerConnection:
        """A way to a peer, for one thread; close it.

        :raises ConflictError: it is blocked.
        """
        self.check_trusted(peer)

        def token(method: str, path: str, ahead: float) -> str:
            return self.tokens.make(method, path, peer.id, offset_seconds=ahead)

        return PeerConnection(peer.url, base64.b64decode(peer.public_key), token)

    def check_trusted(self, peer: Peer) -> None:
        """That a peer may be dealt with.

        :raises ConflictError: it is blocked.
        """
        if peer.state is not PeerState.TRUSTED:
            raise ConflictError(f"peer {peer.name} is {peer.state}", hint="trust it again, or use another")

    def refresh(self, peer: Peer, *, elsewhere: Aside = nullcontext) -> Peer:
        """Ask a peer what it can do; what its row says then, also where that did not work.

        :raises ConflictError: it is blocked.
        """
        try:
            with elsewhere(), self.connection(peer) as connection:
                answer = connection.request("GET", CAPABILITIES_PATH, timeout=_CALL_SECONDS)
            said = {"capabilities": _read(answer.json), "seen_at": now(), "error": None}
        except ConflictError:
            raise
        except CloudletError as error:
            LOG.warning("peer %s: %s", peer.name, error)
            said = {"error": _noted(peer, error)}

        def note(connection: Connection) -> Peer:
            _note(connection, peer.id, **said)
            return PEERS.get(connection, peer.id)

        return self._site.database.write(note)

    def authenticate(self, token: str, method: str, path: str) -> Peer:
        """The peer that has sent a request with a token.

        :raises TokenTimeError: its clock is another one than this site's.
        :raises TokenError: no peer, or one that is blocked, has sent it, or it is not for this request.
        """
        issuer = issuer_of(token)
        peer = self._site.database.read(lambda connection: PEERS.find(connection, id=issuer[:36]))
        if peer is None or peer.id != issuer:
            raise TokenError(
                "it does not know the one that calls", hint="have its operator add that one as a peer"
            )
        public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(peer.public_key))
        verify(token, method, path, public_key, self._site.id, time.time(), self._seen)
        if peer.state is not PeerState.TRUSTED:
            raise TokenError("it has blocked the one that calls", hint="ask its operator")
        self._heard_of(peer)
        return peer

    def _heard_of(self, peer: Peer) -> None:
        """Write down that a peer is there, now and then; at once if it was thought not to trust this site."""
        moment = time.monotonic()
        if (peer.error or {}).get("reason") == _NOT_KNOWN:  # who does not trust a site does not call it
            self._site.database.write(
                lambda connection: _note(connection, peer.id, seen_at=now(), error=None)
            )
            return
        if moment - self._noted.get(peer.id, float("-inf")) < _NOTED_SECONDS:
            return
        self._noted[peer.id] = moment
        self._site.database.write(lambda connection: _note(connection, peer.id, seen_at=now()))

    def _found_at(self, url: str, peer: Peer, elsewhere: Aside) -> Mapping[str, str]:
        """What becomes of a peer's row when it is at another URL, where it has to be."""
        check_url(url, "peer.url")
        with elsewhere():
            found = describe(url, timeout=_CALL_SECONDS)
        if (found.site_id, found.fingerprint) != (peer.id, peer.fingerprint):
            raise SignatureError(
                f"{found.name} at {url} is another site, or has another key",
                hint="give the URL of that peer, or delete it and add it again",
            )
        return {"url": url.rstrip("/"), "certificate": found.certificate}

    @cached_property
    def _qemu(self) -> str:
        """The version of QEMU; empty where none is used."""
        if self._site.machine.hypervisor.name != "qemu":
            return ""
        return ".".join(map(str, find_qemu(self._site.options.machine.qemu_binary)[1]))


def _noted(peer: Peer, error: CloudletError) -> dict[str, str]:
    """Why a call of a peer did not work, as its row says it."""
    if not isinstance(error, PeerError):
        return describe_error(error)
    message = f"{peer.name} refuses: {error.said}" if error.said else error.message
    return {**describe_error(FailedError(message)), "reason": error.reason}


def _note(connection: Connection, peer_id: str, **said: Any) -> None:
    """Write down something of a peer that is no change of it."""
    mine = tables.peers.c.id == peer_id
    connection.execute(sa.update(tables.peers).where(mine).values(**said))


def _digest_of(certificate: Path | None) -> str:
    """SHA-256 of the certificate in a PEM file, the first if there are several; empty for none."""
    if certificate is None:
        return ""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise FailedError(
            f"[peers] tls_certificate: {certificate} is not a certificate", hint="name a PEM file"
        ) from error
    return sha256(found.public_bytes(Encoding.DER)).hexdigest()


def _read(said: Any) -> dict[str, Any]:
    """What a peer says that it can do, as far as it is understood.

    :raises FailedError: it says something else.
    """
    found = said.get("capabilities") if isinstance(said, Mapping) else None
    if not isinstance(found, Mapping):
        raise FailedError("the peer does not say what it can do", hint="is it of another version?")
    versions, bases = found.get("versions"), found.get("bases")
    texts = {name: found.get(name) for name in ("hypervisor", "qemu", "accelerator", "cpu_model")}
    return {
        "versions": [one for one in _list(versions) if type(one) is int],
        **{
            name: text if isinstance(text, str) and _LINE.fullmatch(text) else ""
            for name, text in texts.items()
        },
        "bases": [one for one in _list(bases) if isinstance(one, str) and _DIGEST.fullmatch(one)],
    }


def _list(value: Any) -> list[Any]:
    return value[:_MOST_BASES] if isinstance(value, list) else []
