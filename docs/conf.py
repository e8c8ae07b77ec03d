"""How Sphinx builds this documentation.

Run from the top of the checkout: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.
Pages are Markdown (MyST). Release notes are read by reno from the Git history, so the build needs a
clone with at least one commit, not an unpacked archive. Nothing is fetched from the network while
building.
"""

import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_METADATA = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))

project = "Cloudlet"
copyright = "the Cloudlet contributors, Apache License 2.0"  # noqa: A001 (Sphinx gives the name)
release = version = _METADATA["project"]["version"]

extensions = ["myst_parser", "reno.sphinxext"]
myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results/raw"]

# Every reference must resolve; with -W a broken one ends the build.
nitpicky = True

html_theme = "furo"
html_title = "Cloudlet"
html_copy_source = False
