"""The wire: what a site offers over HTTP.

=============  ====================================================================
table.py       every operation on one page: method, path, handler, policy, version
operation.py   what an operation is, and what its handler gets and gives
handlers/      plain typed functions, a file for each noun
schemas/       bodies and queries, likewise
dispatch.py    from a request to an answer, in one place
identity.py    who calls
policy.py      who may
microversion.py which version of the wire
faults.py      errors as status, code and body
openapi.py     the table as OpenAPI 3.1
wsgi.py        the one module that knows the web framework
=============  ====================================================================
"""
