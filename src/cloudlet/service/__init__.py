"""What a site does for its users: the stories of a cloudlet that is a service.

:mod:`cloudlet.control` makes machines on this machine. Here they become instances that belong to somebody,
have a lease, fit into the site's limits, and outlive the process that serves them. Nothing here knows HTTP.

==============  ================================================================
site.py         what all stories need, wired once
options.py      the settings of a service
capacity.py     what fits, decided under a lock
instances.py    asked for, listed, changed, ended
keeping.py      what becomes of instances: what their keepers tell
overlays.py     the way of an overlay into the site
bases.py        the way of a base
apps.py         descriptors, and what is brought here before it is needed
work.py         operations: long work that survives a crash and can be undone
steps.py        what operations consist of
flows.py        which steps each kind of operation has
engine.py       how steps are run, and remembered
board.py        the job board from which several processes take operations
conductor.py    who takes them
alone.py        being alone with something, among threads and processes
housekeeping.py what one process does for all
shutdown.py     the machine is shut down, and is back
draining.py     the site is to become empty
emptying.py     what runs is handed off to peers, and what becomes of each
underway.py     what is on its way, as refusals name it
placing.py      who could take which instance, and which is first
leases.py       what time does to instances
webhooks.py     events that are pushed, until they arrive or are given up
push.py         one push
tidying.py      what is forgotten when it is old
news.py         who waits for what, in memory
meters.py       what was measured, for Prometheus
==============  ================================================================
"""
