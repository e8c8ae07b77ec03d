"""Settings: where a cloudlet keeps things and what it runs, read once and passed in.

The options are oslo.config's, so that an operator sets them as everywhere in OpenStack: in
``/etc/cloudlet/cloudlet.conf``, ``$XDG_CONFIG_HOME/cloudlet/cloudlet.conf``, a file given with
``--config-file``, or by environment (``OS_DEFAULT__STATE_DIR``). There is no global object.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg

from cloudlet.errors import UsageError


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return (Path(value) if value.startswith("/") else Path.home() / fallback) / "cloudlet"


OPTIONS = (
    cfg.StrOpt("cache_dir", help="Folder for bases and downloads. Default: $XDG_CACHE_HOME/cloudlet."),
    cfg.StrOpt("state_dir", help="Folder for running instances. Default: $XDG_STATE_HOME/cloudlet."),
    cfg.StrOpt("keys_dir", help="Folder for keys. Default: $XDG_CONFIG_HOME/cloudlet/keys."),
    cfg.StrOpt(
        "hypervisor",
        default="qemu",
        help="The driver that runs machines: qemu, fake (machines without a virtual machine, to try things "
        "with), or the name of one that another package installs.",
    ),
    cfg.StrOpt(
        "accelerator",
        default="auto",
        choices=["auto", "kvm", "tcg"],
        help="What executes guests. auto: KVM where a probe shows that it works, else TCG.",
    ),
    cfg.StrOpt("qemu_binary", default="qemu-system-x86_64", help="The QEMU to run, 7.2 or newer."),
    cfg.IntOpt(
        "instance_uid_first",
        default=400000,
        min=1000,
        help="First of the user ids that machines run as, one each, when Cloudlet runs as root.",
    ),
    cfg.IntOpt(
        "image_cache_mib",
        default=8192,
        min=0,
        help="How many MiB the images of apps that were started here may take in the cache folder; a further "
        "start from an image has nothing to build. What was not used for longest goes first; 0 keeps none.",
    ),
    cfg.IntOpt("instance_uid_count", default=10000, min=1, help="How many user ids there are."),
    cfg.StrOpt(
        "bridge",
        default="",
        max_length=15,
        help="A bridge of this machine's network into which the guest of an instance is plugged, besides its "
        "published ports; one instance at a time. Where two sites have bridges that are one network, by a "
        "tunnel for example, open connections survive a hand-off. Default: none; guests reach nothing.",
    ),
)

DATABASE_OPTIONS = (
    cfg.StrOpt(
        "connection",
        secret=True,
        help="The URL of the site's database: sqlite:////PATH, postgresql+psycopg2://USER:PASSWORD@HOST/NAME "
        "or mysql+pymysql://USER:PASSWORD@HOST/NAME. Default: site.sqlite in the state folder.",
    ),
)
API_OPTIONS = (
    cfg.StrOpt(
        "listen",
        help="Where cloudlet serve listens: unix:PATH, or HOST:PORT. Default: api.sock in the state folder.",
    ),
    cfg.StrOpt(
        "auth_strategy",
        choices=["noauth", "http_basic", "keystone"],
        help="How callers show who they are. noauth, only on a Unix socket: who may open it is the operator. "
        "Default: noauth on a Unix socket, else http_basic.",
    ),
    cfg.StrOpt(
        "users_file",
        help="The users of http_basic, a line each: NAME:BCRYPT[:PROJECT[:ROLE,ROLE]]. "
        "Default: users in the configuration folder.",
    ),
    cfg.IntOpt("threads", default=16, min=1, help="How many requests are worked on at a time."),
    cfg.IntOpt(
        "waiters",
        default=512,
        min=1,
        help="How many clients may wait for events and operations, besides those requests.",
    ),
    cfg.IntOpt("transfers", default=64, min=1, help="How many uploads and downloads there may be at a time."),
    cfg.IntOpt("most_body_kib", default=1024, min=1, help="The largest body of a request that is no upload."),
    cfg.StrOpt(
        "publish_address",
        help="The address of this machine on which the ports of instances are published. Default: the host "
        "of listen, else 127.0.0.1.",
    ),
    cfg.StrOpt(
        "public_url",
        help="Where users reach this API: it is what is told to those whose instance has come here from "
        "another site. Default: where it listens, unless that is a Unix socket; where it listens on every "
        "address, at the host of [peers] url.",
    ),
    cfg.StrOpt("tls_certificate", help="A PEM file: serve TLS with this certificate."),
    cfg.StrOpt("tls_key", help="The certificate's key, a PEM file."),
    cfg.StrOpt("policy_file", help="A file of oslo.policy that changes who may do what."),
    cfg.ListOpt(
        "fetch_networks",
        default=[],
        help="Networks besides the public ones from which overlays and bases may be fetched by URL, such as "
        "10.1.0.0/16,fd00::/8. A URL that leads elsewhere is refused: publishers could otherwise look around "
        "where the site is. Where a proxy is configured, the proxy decides instead.",
    ),
)
LIMIT_OPTIONS = (
    cfg.IntOpt(
        "memory_mib",
        min=0,
        mutable=True,
        help="Memory of all instances together. Default: four fifths of this machine's.",
    ),
    cfg.IntOpt(
        "cpus", min=0, mutable=True, help="Virtual CPUs of all instances. Default: 8 times this machine's."
    ),
    cfg.IntOpt(
        "disk_gib",
        default=0,
        min=0,
        mutable=True,
        help="Disks of all instances as the guests see them; 0: no limit.",
    ),
    cfg.IntOpt("instances", default=100, min=0, mutable=True, help="How many instances there may be."),
    cfg.IntOpt(
        "project_upload_mib", default=65536, min=0, mutable=True, help="What one project may upload in all."
    ),
    cfg.IntOpt(
        "base_upload_mib",
        default=262144,
        min=0,
        mutable=True,
        help="Bases that were uploaded or fetched, of all projects together: what they take on the disk, and "
        "what is announced of those that are still coming.",
    ),
    cfg.IntOpt(
        "blob_cache_mib", default=8192, min=0, mutable=True, help="Overlays that can be fetched again."
    ),
)
LEASE_OPTIONS = (
    cfg.IntOpt(
        "default_seconds",
        default=0,
        min=0,
        mutable=True,
        help="A lease that nobody chose; 0: no end.",
    ),
    cfg.IntOpt("most_seconds", default=0, min=0, mutable=True, help="The longest lease; 0: no limit."),
    cfg.IntOpt(
        "warning_seconds",
        default=60,
        min=0,
        mutable=True,
        help="How long before its end a lease is warned of.",
    ),
    cfg.IntOpt(
        "grace_seconds",
        default=300,
        min=0,
        mutable=True,
        help="How long an instance is kept, paused, after it.",
    ),
)
WORK_OPTIONS = (
    cfg.IntOpt(
        "threads",
        default=8,
        min=1,
        help="How many operations a process works on at a time; and as many deletions beside them.",
    ),
    cfg.StrOpt(
        "job_board",
        secret=True,
        help="The Redis server from which cloudlet-conductor takes operations: "
        "redis://[USER:PASSWORD@]HOST[:PORT][/NUMBER], or rediss: with TLS. Any number of processes may then "
        "serve the site, and any number of conductors work for it, all on this machine. Default: none; one "
        "process does both.",
    ),
    cfg.StrOpt(
        "metrics_listen",
        help="HOST:PORT where cloudlet-conductor shows its figures to Prometheus. Default: nowhere.",
    ),
    cfg.IntOpt(
        "keep_days",
        default=30,
        min=1,
        mutable=True,
        help="How long ended operations and hand-offs are kept, and events.",
    ),
)
WEBHOOK_OPTIONS = (
    cfg.ListOpt(
        "allowed_networks",
        default=[],
        help="Networks besides the public ones that webhooks may lead to, such as 10.1.0.0/16,fd00::/8. One "
        "that leads elsewhere is refused when it is made, and whenever something is pushed to it.",
    ),
    cfg.FloatOpt(
        "retry_seconds",
        default=2.0,
        min=0.01,
        help="How long after its first failure a push is tried again; then twice as long, and so on, an hour "
        "at most.",
    ),
    cfg.IntOpt("attempts", default=12, min=1, help="How often a push is tried before it is given up."),
)
PEER_OPTIONS = (
    cfg.StrOpt(
        "listen",
        help="HOST:PORT where other cloudlets reach this one, and nobody else: TLS with a certificate of the "
        "site's own key. Default: nowhere; this site then has no peers that call it.",
    ),
    cfg.StrOpt(
        "url",
        help="The https:// URL that peers are told. Default: that of listen. Where it leads to another TLS "
        "server, which passes on what begins with /v1/peer, tls_certificate is the one that server shows.",
    ),
    cfg.StrOpt(
        "tls_certificate",
        help="A PEM file: the certificate that another TLS server shows at url. It is read again whenever a "
        "peer asks. Default: the site's own.",
    ),
    cfg.FloatOpt(
        "patience_seconds",
        default=600.0,
        min=1.0,
        mutable=True,
        help="How long a hand-off waits for a peer that is silent, before anything is decided.",
    ),
    cfg.FloatOpt(
        "grace_seconds",
        default=60.0,
        min=0.0,
        mutable=True,
        help="How long connections to an instance that has left are forwarded to where it is.",
    ),
    cfg.IntOpt(
        "bandwidth_mbit",
        default=0,
        min=0,
        mutable=True,
        help="The rate at which a hand-off sends, megabits per second; 0: no limit.",
    ),
)
GROUPS: dict[str, tuple[cfg.Opt, ...]] = {
    "DEFAULT": OPTIONS,
    "database": DATABASE_OPTIONS,
    "api": API_OPTIONS,
    "limits": LIMIT_OPTIONS,
    "leases": LEASE_OPTIONS,
    "work": WORK_OPTIONS,
    "webhooks": WEBHOOK_OPTIONS,
    "peers": PEER_OPTIONS,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one machine."""

    cache_dir: Path
    state_dir: Path
    keys_dir: Path
    hypervisor: str = "qemu"
    accelerator: str = "auto"
    qemu_binary: str = "qemu-system-x86_64"
    instance_uid_first: int = 400000
    instance_uid_count: int = 10000
    image_cache_mib: int = 8192
    bridge: str = ""
    """The bridge at which instances are; they are at none where it is empty."""
    fetch_networks: tuple[str, ...] = ()
    """Of a site that serves: the networks besides the public ones into which a URL may lead."""

    @property
    def bases_dir(self) -> Path:
        return self.cache_dir / "bases"

    @property
    def images_dir(self) -> Path:
        return self.cache_dir / "images"

    @property
    def hints_dir(self) -> Path:
        return self.cache_dir / "hints"

    @property
    def instances_dir(self) -> Path:
        return self.state_dir / "instances"

    @property
    def keepers_dir(self) -> Path:
        return self.state_dir / "keepers"


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """All options, for oslo-config-generator."""
    return [(group, list(options)) for group, options in GROUPS.items()]


def config_dir() -> Path:
    """The user's folder of configuration."""
    return _xdg("XDG_CONFIG_HOME", ".config")


def usual_files() -> list[str]:
    """The files that are read where none is named: those that are there."""
    usual = (Path("/etc/cloudlet/cloudlet.conf"), config_dir() / "cloudlet.conf")
    return [str(path) for path in usual if path.exists()]


def unread() -> cfg.ConfigOpts:
    """All options, not read from anywhere yet."""
    conf = cfg.ConfigOpts()
    for group, options in GROUPS.items():
        conf.register_opts(options, group=None if group == "DEFAULT" else group)
    return conf


def read_files(config_file: str | None = None) -> cfg.ConfigOpts:
    """The options as files and environment set them.

    :raises UsageError: a file or a value cannot be used.
    """
    conf = unread()
    files = [config_file] if config_file else usual_files()
    try:
        conf(args=[], project="cloudlet", default_config_files=files, default_config_dirs=[])
    except (cfg.Error, ValueError) as error:
        raise UsageError(f"settings: {error}") from error
    return conf


def load(
    config_file: str | None = None, *, cache_dir: str | None = None, state_dir: str | None = None
) -> Settings:
    """Read the settings; what is given here goes before what is configured.

    :raises UsageError: a file or a value cannot be used.
    """
    return settings_of(read_files(config_file), cache_dir=cache_dir, state_dir=state_dir)


def settings_of(
    conf: cfg.ConfigOpts, *, cache_dir: str | None = None, state_dir: str | None = None
) -> Settings:
    """The settings that options say, as :func:`load` reads them.

    :raises UsageError: a value cannot be used.
    """
    try:
        return Settings(
            cache_dir=Path(cache_dir or conf.cache_dir or _xdg("XDG_CACHE_HOME", ".cache")).resolve(),
            state_dir=Path(state_dir or conf.state_dir or _xdg("XDG_STATE_HOME", ".local/state")).resolve(),
            keys_dir=Path(conf.keys_dir or config_dir() / "keys").resolve(),
            hypervisor=conf.hypervisor,
            accelerator=conf.accelerator,
            qemu_binary=conf.qemu_binary,
            instance_uid_first=conf.instance_uid_first,
            instance_uid_count=conf.instance_uid_count,
            image_cache_mib=conf.image_cache_mib,
            bridge=conf.bridge,
            fetch_networks=tuple(conf.api.fetch_networks),
        )
    except (cfg.Error, ValueError) as error:
        raise UsageError(f"settings: {error}") from error
