"""The stories: what a cloudlet does, each readable from top to bottom.

``bases.py`` makes a base, ``publishing.py`` an overlay, ``synthesis.py`` a running machine from both.
They know what has to happen and in which order; how is the business of the layers below.
"""
