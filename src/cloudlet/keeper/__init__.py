"""The keeper: the process that owns one instance of a site, from its first byte to its end.

A machine must outlive the site's process, which may be restarted, upgraded or killed, and somebody has to
hold what the machine depends on meanwhile: its lock, its memory file, the overlay's bytes on their way. That
is the keeper. It does what ``cloudlet run`` does, tells what becomes of it, and does what it is told.

============  =================================================================
order.py      what a keeper is told to keep, and what it says of it
wire.py       lines of JSON on a Unix socket
process.py    the life of a keeper
control.py    its socket: who watches, who asks for something
nursery.py    the process from which keepers are forked, so that one starts at once
handle.py     a keeper as its site sees it: started, found again, asked
============  =================================================================

A keeper has a folder, named by the instance, whose lock it holds as long as it lives. What it said last
stays there after its end, until the site has taken note of it.
"""
