"""The reference application's model: half random bytes, half text; the same for everybody.

usage: python3 model.py FILE MIB
"""

import random
import sys
from pathlib import Path

MIB = 1 << 20


def model(mib: int) -> bytes:
    """A model of so many MiB, an even number."""
    half = mib * MIB // 2
    choose = random.Random(7)
    letters = b"abcdefghijklmnopqrstuvwxyz"
    words = [bytes(choose.choices(letters, k=choose.randint(3, 9))) for _ in range(4000)]
    text = bytearray()
    while len(text) < half:
        text += b" ".join(choose.choices(words, k=10_000)) + b"\n"
    return random.Random(1).randbytes(half) + bytes(text[:half])


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(model(int(sys.argv[2])))
