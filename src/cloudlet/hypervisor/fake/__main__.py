"""Start the process of a fake machine: ``python -I -S .../cloudlet/hypervisor/fake/__main__.py JSON``.

It is started by its path and without ``site``, which halves the interpreter's start; so the folder that
holds the package is made known here. At the end of the path: it must not hide the standard library.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).absolute().parents[3]))
    from cloudlet.hypervisor.fake.process import main

    main(sys.argv[1])
