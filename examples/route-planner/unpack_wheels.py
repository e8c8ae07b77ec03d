"""Unpacks the pinned wheels into one folder, without what a running service never reads.

Runs on the host, in the recipe's `prepare` step, so that neither the wheels nor their tests,
headers and type stubs ever touch the guest's disk: each block written there is in the overlay.
It does what a service needs of an installer and no more: no scripts, no dependencies, no byte code
(the guest compiles with its own Python). Licence texts in `*.dist-info` are kept.

Usage: python3 unpack_wheels.py REQUIREMENTS WHEELS SITE. Exit 1 if a pinned wheel is missing.
"""

import fnmatch
import hashlib
import pathlib
import re
import shutil
import sys
import zipfile

# fnmatch's * also matches "/". `_simd` and `_*_tests` are numpy's modules for its own test-suite.
UNUSED = (
    "*/tests/*",
    "*.pyi",
    "*.pxd",
    "*.h",
    "*.a",
    "numpy/_core/_*_tests.*.so",
    "numpy/_core/_simd.*.so",
    "numpy/_pyinstaller/*",
    "numpy/distutils/*",
    "numpy/f2py/*",
    "numpy/testing/*",
    "numpy/typing/*",
    "pyvrp/cli.py",
    "pyvrp/plotting/*",
)


def pinned(requirements: str) -> set[str]:
    """The sha256 digests, in hexadecimal, that a requirements file allows."""
    return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", requirements))


def unpack(requirements: pathlib.Path, wheels: pathlib.Path, site: pathlib.Path) -> int:
    """Fill `site` afresh from exactly the pinned wheels; return the bytes written.

    Other wheels in the folder (of earlier pins) are passed over. Raises LookupError for a pin
    without a wheel.
    """
    by_digest = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in sorted(wheels.glob("*.whl"))}
    digests = pinned(requirements.read_text(encoding="utf-8"))
    if absent := sorted(digests - by_digest.keys()):
        raise LookupError(f"no wheel in {wheels} has sha256 {', '.join(absent)}")
    shutil.rmtree(site, ignore_errors=True)
    written = 0
    for digest in sorted(digests):
        with zipfile.ZipFile(by_digest[digest]) as wheel:
            for entry in wheel.infolist():
                if any(fnmatch.fnmatchcase(entry.filename, pattern) for pattern in UNUSED):
                    continue
                wheel.extract(entry, site)
                written += entry.file_size
    return written


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: unpack_wheels.py REQUIREMENTS WHEELS SITE")
    try:
        size = unpack(*map(pathlib.Path, sys.argv[1:]))
    except LookupError as error:
        sys.exit(f"unpack_wheels.py: {error}")
    print(f"{sys.argv[3]}: {size / 1e6:.1f} MB")
