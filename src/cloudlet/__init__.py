"""Cloudlet: an edge cloud that brings an application's warm virtual machine to its user.

The folders beside this file are the architecture, from the command line at the top to the pure
overlay engine at the bottom; ``ARCHITECTURE.md`` tells the story and ``import-linter`` keeps it.
"""

__version__ = "0.1.0"
