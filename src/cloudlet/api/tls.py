"""The certificate that a site shows, and the key that belongs to it: two PEM files."""

from __future__ import annotations

import ssl
from datetime import datetime
from pathlib import Path

from cryptography import x509

from cloudlet.errors import UsageError, of_the_system


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
