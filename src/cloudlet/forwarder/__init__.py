"""The network process of an instance: all that a guest's network is, and all that reaches it.

One process per instance stands between the host and the guest. It holds the instance's published
ports, which the site bound in the host's network, and lives in a network namespace of its own in
which there is nothing but itself and a cable to the guest's card. So a client of a published port
is relayed to the guest, and nothing that the guest sends has anywhere to go. Only where the site's
operator has named a bridge does the cable lead to that, too.

Read ``process`` first: it is the story. ``namespace`` makes and furnishes the empty network,
``uplink`` is the way to a bridge, ``wire`` is the cable, ``dhcp`` tells the guest its address,
``relay`` moves the clients' bytes, all in one ``loop``. The TCP on both sides is the kernel's. Only
light modules of the standard library are imported here (no pathlib, dataclasses or json), since an
instance waits for this process to start. The site's side of it is
``cloudlet.hypervisor.qemu.network``.
"""
