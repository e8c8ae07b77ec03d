"""Makes X-n200-first20.vrp: the depot and the first 20 customers of X-n200-k36, capacity unchanged.

Run it in this folder: `python3 first20.py > X-n200-first20.vrp`. It draws nothing at random, so the
same input gives the same bytes. The result has no published best solution.
"""

import pathlib

CUSTOMERS = 20


def shorten(vrp: str, customers: int) -> str:
    """The instance with only its depot (node 1) and nodes 2 to `customers` + 1."""
    lines: list[str] = []
    section = ""
    for raw in vrp.splitlines():
        words = raw.split()
        if words[0].endswith("_SECTION"):
            section = words[0]
        elif section in ("NODE_COORD_SECTION", "DEMAND_SECTION"):
            if int(words[0]) > customers + 1:
                continue
        elif words[0] == "NAME":
            words = ["NAME", ":", f"X-n200-first{customers}"]
        elif words[0] == "COMMENT":
            words = ["COMMENT", ":", f"Depot and first {customers} customers of X-n200-k36 (Uchoa)"]
        elif words[0] == "DIMENSION":
            words = ["DIMENSION", ":", str(customers + 1)]
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source = pathlib.Path(__file__).with_name("X-n200-k36.vrp")
    print(shorten(source.read_text(encoding="ascii"), CUSTOMERS), end="")
