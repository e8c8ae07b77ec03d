"""The settings of a service, read once; those that may change while it runs are read again at SIGHUP."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from oslo_config import cfg

from cloudlet.errors import UsageError
from cloudlet.model import GIBIBYTE, MEBIBYTE
from cloudlet.settings import Settings, config_dir
from cloudlet.transfer.description import check_url
from cloudlet.transfer.networks import Networks

EVERY_ADDRESS = ("0.0.0.0", "::")
"""Hosts to listen at that lead nowhere."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What all instances together may have; None: as much as there is."""

    memory_bytes: int
    cpus: int
    disk_bytes: int | None
    instances: int
    project_upload_bytes: int
    base_upload_bytes: int
    blob_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Leases:
    """Seconds of leases; 0 in the first two: without end."""

    default: int
    most: int
    warning: int
    grace: int


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a service listens: a Unix socket, or a host and a port."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Listening:
        """Read ``unix:PATH`` or ``HOST:PORT``.

        :raises UsageError: it is neither.
        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(path=Path(rest).absolute())
        host, _, port = text.rpartition(":")
        if host and port.isdecimal() and int(port) < 65536:
            return cls(host=host.removeprefix("[").removesuffix("]"), port=int(port))
        raise UsageError(
            f"cannot listen at {text!r}", hint="write unix:/run/cloudlet/api.sock or 127.0.0.1:8790"
        )


@dataclass(frozen=True, slots=True)
class Peering:
    """How other cloudlets reach this one, and how a hand-off treats them."""

    listening: Listening | None
    """Where only they are served; None: nowhere."""
    url: str
    """What they are told; empty where nothing is configured, or the kernel chooses the port."""
    certificate: Path | None
    """What another TLS server shows at ``url``; None: that is the site's own certificate."""
    patience_seconds: float
    grace_seconds: float
    bytes_per_second: float | None
    """At which a hand-off sends; None: as fast as it can."""


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of a service."""

    machine: Settings
    database_url: str
    listening: Listening
    auth_strategy: str
    users_file: Path
    threads: int
    waiters: int
    transfers: int
    most_body_bytes: int
    publish_address: str
    public_url: str
    """Where users reach the API; empty where nobody knows."""
    tls: tuple[Path, Path] | None
    policy_file: Path | None
    limits: Limits
    leases: Leases
    workers: int
    job_board: str | None
    """Where operations go that conductors work on; None: this process does."""
    metrics: Listening | None
    """Where a conductor shows its figures."""
    keep_days: int
    webhook_retry: timedelta
    """After the first failure; each further wait is twice as long."""
    webhook_attempts: int
    webhook_networks: Networks
    fetch_networks: Networks
    peers: Peering
    keystone: cfg.ConfigOpts
    """The files, for what they say in ``[keystone_authtoken]``."""

    @property
    def blobs_dir(self) -> Path:
        return self.machine.state_dir / "blobs"


def read_options(conf: cfg.ConfigOpts, machine: Settings, listen: str | None = None) -> Options:
    """The settings of a service from what was configured.

    :param listen: goes before what is configured.
    :raises UsageError: they contradict each other.
    """
    state = machine.state_dir
    listening = Listening.parse(listen or conf.api.listen or f"unix:{state / 'api.sock'}")
    strategy = conf.api.auth_strategy or ("noauth" if listening.path else "http_basic")
    if strategy == "noauth" and not listening.path:
        raise UsageError(
            "without authentication only a Unix socket can be served: guests and others reach every port",
            hint="listen at unix:PATH, or set auth_strategy to http_basic or keystone",
        )
    certificate, key = conf.api.tls_certificate, conf.api.tls_key
    if bool(certificate) != bool(key):
        raise UsageError("tls_certificate and tls_key belong together", hint="set both or none")
    return Options(
        machine=machine,
        database_url=conf.database.connection or f"sqlite:///{state / 'site.sqlite'}",
        listening=listening,
        auth_strategy=strategy,
        users_file=Path(conf.api.users_file or config_dir() / "users"),
        threads=conf.api.threads,
        waiters=conf.api.waiters,
        transfers=conf.api.transfers,
        most_body_bytes=conf.api.most_body_kib << 10,
        publish_address=conf.api.publish_address or listening.host or "127.0.0.1",
        public_url=(conf.api.public_url or _own_url(listening, encrypted=bool(certificate))).rstrip("/"),
        tls=(Path(certificate), Path(key)) if certificate else None,
        policy_file=Path(conf.api.policy_file) if conf.api.policy_file else None,
        limits=_limits(conf),
        leases=Leases(
            conf.leases.default_seconds,
            conf.leases.most_seconds,
            conf.leases.warning_seconds,
            conf.leases.grace_seconds,
        ),
        workers=conf.work.threads,
        job_board=conf.work.job_board,
        metrics=Listening.parse(conf.work.metrics_listen) if conf.work.metrics_listen else None,
        keep_days=conf.work.keep_days,
        webhook_retry=timedelta(seconds=conf.webhooks.retry_seconds),
        webhook_attempts=conf.webhooks.attempts,
        webhook_networks=_networks("webhooks.allowed_networks", conf.webhooks.allowed_networks),
        fetch_networks=_networks("api.fetch_networks", machine.fetch_networks),
        peers=_peering(conf),
        keystone=conf,
    )


def _networks(option: str, given: Iterable[str]) -> Networks:
    try:
        return Networks(given)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}", hint=error.hint) from error


def _peering(conf: cfg.ConfigOpts) -> Peering:
    peers = conf.peers
    listening = Listening.parse(peers.listen) if peers.listen else None
    if listening and listening.path:
        raise UsageError("[peers] listen is no Unix socket", hint="write HOST:PORT: peers come by TLS")
    if peers.url:
        check_url(peers.url, "[peers] url")
    elif listening and listening.host in ("0.0.0.0", "::"):
        raise UsageError(
            f"[peers] url is missing: peers cannot be told {listening.host}",
            hint="set it to https://NAME:PORT, as they reach this site",
        )
    if peers.tls_certificate and not peers.url:
        raise UsageError(
            "[peers] tls_certificate is for another TLS server", hint="set [peers] url to where that is"
        )
    return Peering(
        listening=listening,
        url=peers.url.rstrip("/") if peers.url else _url_of(listening),
        certificate=Path(peers.tls_certificate) if peers.tls_certificate else None,
        patience_seconds=peers.patience_seconds,
        grace_seconds=peers.grace_seconds,
        bytes_per_second=peers.bandwidth_mbit * 1e6 / 8 or None,
    )


def _own_url(listening: Listening, *, encrypted: bool) -> str:
    """Where the API is reached, as far as its settings say."""
    if not listening.port or listening.host in EVERY_ADDRESS:
        return ""
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"{'https' if encrypted else 'http'}://{host}:{listening.port}"


def _url_of(listening: Listening | None) -> str:
    if not listening or not listening.port:
        return ""
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"https://{host}:{listening.port}"


def _limits(conf: cfg.ConfigOpts) -> Limits:
    limits = conf.limits
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Limits(
        memory_bytes=here * 4 // 5 if limits.memory_mib is None else limits.memory_mib * MEBIBYTE,
        cpus=8 * (os.cpu_count() or 1) if limits.cpus is None else limits.cpus,
        disk_bytes=limits.disk_gib * GIBIBYTE or None,
        instances=limits.instances,
        project_upload_bytes=limits.project_upload_mib * MEBIBYTE,
        base_upload_bytes=limits.base_upload_mib * MEBIBYTE,
        blob_cache_bytes=limits.blob_cache_mib * MEBIBYTE,
    )
