"""The page server of an instance: it answers for pages of which some have not come yet.

One process per instance serves two files, each a FUSE connection of its own whose root is the file:
guest RAM, which QEMU maps, and the app's disk layer, which QEMU reads. What is in a page, a byte of
the state file says: the base's content, the app's, or nothing yet; who reads that waits until the
instance's owner has written it. The server only reads, and knows nothing of overlays.

Read ``server`` first: it is the story. ``state`` is the file that server and owner share, ``content``
what a page holds, ``fuse`` the kernel's protocol, ``owner`` the line to the owner, ``touched`` the
order in which pages are first read. Nothing but light modules of the standard library is imported (no
socket, collections, dataclasses), since an instance waits for this process to start. The site's side
of it is ``cloudlet.hypervisor.qemu.page_server``.
"""
