"""The QEMU driver: an unmodified ``qemu-system-x86_64``, 7.2 or newer.

=================  ===============================================================================
machine.py         the machine: which devices, at which addresses, as a command line
launch.py          a confined process from it, everything handed over as descriptors
sockets.py         Unix sockets in the instance's folder
monitor.py         QMP
agent.py           the guest agent's channel
network.py         the instance's network process
memory.py          the base's RAM as a sealed memory file that instances share
stream.py          the incoming migration stream, written by hand
qcow2.py           the instance's disk, written while its blocks arrive
layer.py           the files of an app's pages, on which an instance may stand
layer_sink.py      these files written without a machine
page_server.py     the instance's page server, which serves pages that are still coming
hugepages.py       the kernel kept from reading a mebibyte where a page is touched
process_memory.py  the memory of another process
changed.py         which pages an instance has changed, and their bytes
disk.py            which blocks it has changed, and their bytes
capture.py         both, in files
rounds.py          both, again and again while it runs
digest.py          one digest of all it has
sections.py        the list of device sections in a device state
ramblocks.py       that the guest's RAM is all the memory there is to capture
accelerator.py     KVM where it really works, else TCG
instance.py        one machine that runs
incoming.py        one machine that is being filled before it runs
early.py           one machine that is being filled while it runs
receiving.py       one machine that comes from another site
driver.py          the driver that ties them
=================  ===============================================================================
"""
