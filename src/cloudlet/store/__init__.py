"""What a site keeps: bases by content, and keys.

Nothing here runs a machine. A file that is half written has a name that nobody looks for.
"""
