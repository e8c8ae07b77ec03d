"""The fake driver: the contract of :mod:`cloudlet.hypervisor.driver` without a virtual machine.

It ships with the product, so that whoever writes against Cloudlet has machines that start in a tenth of
a second. A fake machine is a real process with a record, RAM and a disk that are bytes in files, sockets,
ports that answer, a console and a guest agent; only its guest is a small program of ours in place of an
operating system. Nothing of what the guest is told to do is executed on the host. It isolates nothing,
and its captures run on no other driver.

==============  ======================================================================
files.py        a file system in the pages of the machine
optical.py      what an ISO image holds
script.py       a script of the guest's shell, read
shell.py        the guest's shell, a small part of POSIX's
programs.py     the programs that the guest has
guest.py        the guest: counter, web pages, identity, commands
agent.py        the guest's end of the agent channel, in QEMU's protocol
connections.py  bytes come, an answer goes
process.py      the machine's process: monitor, sockets, the guest while it runs
devices.py      the device state and its sections
instance.py     one machine that runs
rounds.py       its pages, read while it runs
incoming.py     one machine that is being filled
driver.py       the driver that ties them
==============  ======================================================================

The process is started without ``site``, for a quick start: what it imports (the first nine) stands on
the standard library alone.
"""
