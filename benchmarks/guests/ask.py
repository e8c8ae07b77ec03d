"""What the warm-ups ask: each of the URLs given, in order, as the benchmarks' own client asks.

A client's headers decide what a server allocates for it, and so which of its pages are needed first.
"""

import sys
import urllib.request

for url in sys.argv[1:]:
    with urllib.request.urlopen(url) as answer:
        answer.read()
