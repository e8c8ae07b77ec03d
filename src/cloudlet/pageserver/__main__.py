"""Start the page server: ``python -I -S .../cloudlet/pageserver/__main__.py ARGUMENTS``.

It is started by its path and without ``site``, which halves the interpreter's start; so the folder
that holds the package is made known here. At the end of the path: it must not hide the standard
library.
"""

import os
import sys

if __name__ == "__main__":
    above = os.path.join(os.path.dirname(__file__), "..", "..")  # noqa: PTH118, PTH120 (see package)
    sys.path.append(os.path.abspath(above))  # noqa: PTH100 (see package)
    from cloudlet.pageserver.server import main

    sys.exit(main(sys.argv[1:]))
