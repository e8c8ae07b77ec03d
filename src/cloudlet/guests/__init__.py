"""Guests that this project builds itself: one folder per distribution, each a recipe of its own.

A recipe is a folder with an executable ``build`` and a tree ``files/`` that is copied into the
guest's root. ``build`` makes the disk, kernel, initial RAM disk and kernel command line of a base
VM; booting and capturing it is not its business. Its contract stands at the top of
``debian/build``: to support another distribution, copy that folder and keep the four results and
the two programs that the host calls in the guest, ``/usr/lib/cloudlet/clone-agent`` and
``/usr/lib/cloudlet/quiet``.

No Python runs from here: the package exists so that the recipes are installed as its data.
"""
