"""The command line: ``cloudlet NOUN VERB``, one file per noun, on cliff.

A command reads its arguments, calls one story, and shows what came of it. It decides nothing.
"""
