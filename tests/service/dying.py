"""A server that is killed: ``python -m tests.service.dying FOLDER MADE HASH KIND STEP STATE``.

It serves a site as ``cloudlet serve`` does, says where on standard output, and ends with SIGKILL when an
operation of a kind is about to note that a step has a state. Without a kind it goes on until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from cloudlet.api.service import build, server_of
from cloudlet.service.site import ServedSite
from tests.service.conftest import Made, options_in


def main() -> None:
    folder, made, hashed, *moment = sys.argv[1:]
    told = json.loads(made)
    where = Made(Path(told["cache"]), Path(told["keys"]), told["base_id"], Path(told["overlay"]))

    def observe(kind: str, step: str, state: str) -> None:
        if [kind, step, str(state)] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    site = ServedSite.open(options_in(Path(folder), where, hashed), observe)
    server = server_of(site.options, build(site))
    print(server.where, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
