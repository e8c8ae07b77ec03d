"""Keys: those that sign overlays here, and those whose overlays run here.

``signing/NAME.pem`` is a private Ed25519 key (PKCS#8, only for its owner), ``trusted/NAME.pub`` a public
key (PEM) whose overlays are accepted. Making a key does not trust it elsewhere: its public half has to
be carried there and trusted by who runs that site.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from cloudlet.errors import ConflictError, NotFoundError, RefusedError, SignatureError, UsageError

DEFAULT = "default"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the ring."""

    name: str
    key_id: bytes
    """BLAKE3 of the raw public key."""
    signs: bool
    trusted: bool


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, ready to sign."""

    name: str
    key_id: bytes
    private: Ed25519PrivateKey = field(repr=False)
    """For what signs in a form of its own, such as a token; it leaves this process nowhere."""
    file: Path
    """Where it is, for what reads keys by itself, such as TLS."""

    def __call__(self, message: bytes) -> tuple[bytes, bytes]:
        return self.key_id, self.private.sign(message)

    @property
    def public_raw(self) -> bytes:
        """The public half, 32 bytes."""
        return self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def public_pem(self) -> bytes:
        """The public half, as PEM."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class KeyRing:
    """The folder of all keys."""

    def __init__(self, folder: Path) -> None:
        self._signing = folder / "signing"
        self._trusted = folder / "trusted"

    def generate(self, name: str = DEFAULT) -> Key:
        """Make a key that signs here and is trusted here.

        :raises ConflictError: there is one of this name.
        """
        _check_name(name)
        if (self._trusted / f"{name}.pub").exists():
            raise ConflictError(f"there is a key {name!r} already", hint="cloudlet key list")
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_new(self._signing / f"{name}.pem", pem, 0o600)
        try:
            self._write_trusted(name, private.public_key())
        except BaseException:
            (self._signing / f"{name}.pem").unlink()
            raise
        return Key(name, key_id(private.public_key()), signs=True, trusted=True)

    def trust(self, file: Path, name: str) -> Key:
        """Accept overlays that are signed by the key in a PEM file.

        :raises UsageError: the file does not hold an Ed25519 public key.
        """
        _check_name(name)
        public = _load_public(file)
        self._write_trusted(name, public)
        return Key(name, key_id(public), signs=False, trusted=True)

    def distrust(self, name: str) -> None:
        """No longer accept overlays signed by this key."""
        _check_name(name)
        try:
            (self._trusted / f"{name}.pub").unlink()
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no trusted key {name!r}", hint="cloudlet key list") from error

    def public_pem(self, name: str) -> bytes:
        """The public half of a key of this ring, to be carried to other sites."""
        _check_name(name)
        if (self._trusted / f"{name}.pub").exists():
            return (self._trusted / f"{name}.pub").read_bytes()
        private = self._load_private(name)
        return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def all(self) -> list[Key]:
        """All keys, by name."""
        signing = {
            path.stem: key_id(self._load_private(path.stem).public_key())
            for path in self._signing.glob("*.pem")
        }
        trusted = {path.stem: key_id(_load_public(path)) for path in self._trusted.glob("*.pub")}
        return [
            Key(name, trusted.get(name, signing.get(name, b"")), name in signing, name in trusted)
            for name in sorted(signing.keys() | trusted.keys())
        ]

    def signer(self, name: str = DEFAULT) -> Signer:
        """The key to sign with.

        :raises NotFoundError: there is none of this name.
        """
        _check_name(name)
        private = self._load_private(name)
        return Signer(name, key_id(private.public_key()), private, self._signing / f"{name}.pem")

    def verify(self, wanted: bytes, message: bytes, signature: bytes) -> str:
        """The name of the trusted key that signed ``message``.

        :raises SignatureError: it is not trusted here, or the signature does not match.
        """
        for path in self._trusted.glob("*.pub"):
            public = _load_public(path)
            if key_id(public) == wanted:
                try:
                    public.verify(signature, message)
                except InvalidSignature as error:
                    raise SignatureError(f"the signature does not match the key {path.stem}") from error
                return path.stem
        raise SignatureError(
            f"signed by key {wanted.hex()[:16]}, which is not trusted here",
            hint="cloudlet key trust NAME FILE, if you know whose it is",
        )

    def stamp(self) -> int:
        """A number that is another one when the trusted keys have changed."""
        try:
            return self._trusted.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _load_private(self, name: str) -> Ed25519PrivateKey:
        path = self._signing / f"{name}.pem"
        try:
            private = load_pem_private_key(path.read_bytes(), None)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"there is no key {name!r} to sign with", hint=f"cloudlet key create {name}"
            ) from error
        except PermissionError as error:
            raise RefusedError(f"{path} may not be read") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(f"{path} is not a private key") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError(f"{path} is not an Ed25519 key")
        return private

    def _write_trusted(self, name: str, public: Ed25519PublicKey) -> None:
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        path = self._trusted / f"{name}.pub"
        if path.exists() and path.read_bytes() == pem:
            return
        write_new(path, pem, 0o644)


def key_id(public: Ed25519PublicKey) -> bytes:
    """The name of a key in an overlay: BLAKE3 of its 32 raw bytes."""
    return blake3(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).digest()


def _load_public(path: Path) -> Ed25519PublicKey:
    try:
        public = load_pem_public_key(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a public key in PEM form") from error
    if not isinstance(public, Ed25519PublicKey):
        raise UsageError(f"{path} is not an Ed25519 key")
    return public


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name for a key", hint="letters, digits, dot, dash, underscore")


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file of a key that is not there yet; all of it, or none.

    :raises ConflictError: it is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise ConflictError(f"there is a key {path.stem!r} already", hint="cloudlet key list") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        path.unlink()
        raise
