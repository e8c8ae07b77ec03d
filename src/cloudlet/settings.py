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
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one program."""

    cache_dir: Path
    state_dir: Path
    keys_dir: Path
    hypervisor: str = "qemu"
    accelerator: str = "auto"
    qemu_binary: str = "qemu-system-x86_64"
    instance_uid_first: int = 400000
    instance_uid_count: int = 10000
    image_cache_mib: int = 8192

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


def load(
    config_file: str | None = None, *, cache_dir: str | None = None, state_dir: str | None = None
) -> Settings:
    """Read the settings; what is given here goes before what is configured.

    :raises UsageError: a file or a value cannot be used.
    """
    conf = cfg.ConfigOpts()
    conf.register_opts(OPTIONS)
    config_dir = _xdg("XDG_CONFIG_HOME", ".config")
    usual = (Path("/etc/cloudlet/cloudlet.conf"), config_dir / "cloudlet.conf")
    files = [config_file] if config_file else [str(path) for path in usual if path.exists()]
    try:
        conf(args=[], project="cloudlet", default_config_files=files, default_config_dirs=[])
        return Settings(
            cache_dir=Path(cache_dir or conf.cache_dir or _xdg("XDG_CACHE_HOME", ".cache")).resolve(),
            state_dir=Path(state_dir or conf.state_dir or _xdg("XDG_STATE_HOME", ".local/state")).resolve(),
            keys_dir=Path(conf.keys_dir or config_dir / "keys").resolve(),
            hypervisor=conf.hypervisor,
            accelerator=conf.accelerator,
            qemu_binary=conf.qemu_binary,
            instance_uid_first=conf.instance_uid_first,
            instance_uid_count=conf.instance_uid_count,
            image_cache_mib=conf.image_cache_mib,
        )
    except (cfg.Error, ValueError) as error:
        raise UsageError(f"settings: {error}") from error
