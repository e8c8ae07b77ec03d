"""Where bytes come from: a file, a pipe or a server, in order or by range, through cuts and within patience.

``source.py`` is what the stories use. Beneath it an ``origin.py`` (a file, a pipe) or a ``download.py``
of one ``resource.py``, with ``ranges.py``; all that comes passes one ``link.py``, counted and measured.
``networks.py`` says where a URL may lead that is not the operator's own.
"""
