"""The certificate that a site shows, and the key that belongs to it: two PEM files, or the site's own key."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloudlet.errors import UsageError, of_the_system
from cloudlet.store.keyring import Signer

_ALWAYS, _NEVER = datetime(2020, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""The latter is how a certificate says that it has no end (RFC 5280, 4.1.2.5)."""


def context_of(certificate: Path, key: Path) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.2 or newer with a certificate; chains follow it in its file.

    :raises UsageError: the files are not there, or are not a certificate and its key.
    """
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        _read(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A server that asked for a passphrase would wait at its start for somebody who is not there.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise UsageError(
            f"tls_certificate {certificate} and tls_key {key} are not a certificate and its key",
            hint="both are PEM files, the key without a passphrase",
        ) from error
    return context


def own_context(signer: Signer, site_id: str, place: Path) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.3 with a certificate of the site's own key.

    Who connects knows the key, and looks at nothing else of the certificate. So it never ends; and the same
    key makes the same one, in each process of the site.

    :param place: where the certificate is written to.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site_id)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(signer.private.public_key())
        .serial_number(int.from_bytes(signer.key_id[:16]) >> 1 | 1)
        .not_valid_before(_ALWAYS)
        .not_valid_after(_NEVER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer.private, None)
    )
    new = place.with_name(f".{place.name}.{os.getpid()}")
    new.write_bytes(made.public_bytes(Encoding.PEM))
    new.replace(place)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(place, signer.file)
    return context


def ends_at(certificate: Path) -> datetime:
    """The moment from which on clients refuse a certificate.

    :raises UsageError: the file is not there, or is no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(_read("tls_certificate", certificate)).not_valid_after_utc
    except ValueError as error:
        raise UsageError(f"tls_certificate: {certificate} is not a certificate", hint="as PEM") from error


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: {of_the_system(error).message}", hint="name a PEM file") from error
