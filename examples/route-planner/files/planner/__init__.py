"""Plans collection routes over HTTP: a posted CVRPLIB instance in, capacity-feasible routes out.

`instance` reads the format, `solver` holds PyVRP, `query` says what may be asked, `service` answers
HTTP, `page` draws the last plan, `server` bounds and remembers, `__main__` starts and warms up.
All state is in memory: whoever captures the machine captures it.
"""
