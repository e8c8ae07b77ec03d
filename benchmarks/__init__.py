"""Measures every number that SPECIFICATION.md promises, beside what it is compared with, in one run.

``python -m benchmarks`` (``make bench``) prints what it does and writes the table and the picture in
``docs/results``. Guests and bases are made once and kept in ``.setup/bench`` of the checkout.
"""
