"""Start the network process: ``python -I -S .../cloudlet/forwarder/__main__.py ARGUMENTS``.

It is started by its path and without ``site``, which halves the interpreter's start; so the folder
that holds the package is made known here. At the end of the path: it must not hide the standard
library.
"""

import os
import sys

if __name__ == "__main__":
    here = os.path.abspath(__file__)
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(here))))
    from cloudlet.forwarder.process import main

    sys.exit(main(sys.argv[1:]))
