"""The overlay engine: what an application adds to a base VM, as a file.

Pure: it sees descriptors and streams, no paths, processes or sockets, and it holds no keys. The
format is ``docs/formats/overlay.md``. Reading, from the bottom up: :mod:`limits`, :mod:`pages`,
:mod:`header`, :mod:`frames`, :mod:`root`, :mod:`payload`, :mod:`pagemap` say what a file is made
of; :mod:`reader` and :mod:`table` get at its parts; :mod:`apply` builds pages from it;
:mod:`index`, :mod:`plan`, :mod:`encode`, :mod:`pack` and :mod:`create` make one; :mod:`sign` and
:mod:`diff` take and compare whole files.
"""
