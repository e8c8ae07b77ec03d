"""``cloudlet-manage config sample`` and ``policy sample``: what can be set, with defaults."""

from __future__ import annotations

import argparse
import contextlib
import io
from importlib.util import find_spec

from oslo_config import cfg, generator
from oslo_policy.generator import generate_sample

from cloudlet.cli.manage.command import ManageCommand

_WITH_KEYSTONE = "keystonemiddleware.auth_token"


class Config(ManageCommand):
    """Print a cloudlet.conf with all options, their defaults and what they mean; each line is a comment."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        names = ["cloudlet", "oslo.log", *([_WITH_KEYSTONE] if find_spec("keystonemiddleware") else [])]
        conf = cfg.ConfigOpts()
        generator.register_cli_opts(conf)
        conf([f"--namespace={name}" for name in names], default_config_files=[], default_config_dirs=[])
        text = io.StringIO()
        generator.generate(conf, text)
        self.app.stdout.write(text.getvalue())


class Policy(ManageCommand):
    """Print a policy.yaml with all rules as they are; each line is a comment."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            generate_sample(["--namespace=cloudlet"], cfg.ConfigOpts())
        self.app.stdout.write(text.getvalue())
