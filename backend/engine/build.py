"""Build the engine as the extension `tmem._engine`. cffi reads the declarations of engine.h.

Assertions are always on: they are few, and a broken table must not be written through. TMEM_CFLAGS has more flags for
the compiler: the Makefile turns warnings into errors by it; with `-DTMEM_DEBUG` a mount checks all tables at its end.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cffi import FFI

HERE = Path("backend/engine")  # setup.py runs in the root of the project
HEADERS = {"lz4.h": "liblz4-dev", "xxhash.h": "libxxhash-dev"}
# cffi's own code, around the declarations, is not ours to mend.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "engine.h"
"""


def declarations() -> str:
    """Return the part of the header that cffi reads."""
    return (HERE / "engine.h").read_text().split("/* BEGIN CDEF */")[1].split("/* END CDEF */")[0]


def check_headers() -> None:
    """Exit with one clear line if a compiler or a header of a library is missing."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        sys.exit(f"tmemfs: there is no C compiler ({compiler[0]}); apt install gcc libc6-dev")
    missing = [
        package
        for header, package in HEADERS.items()
        if subprocess.run(
            [*compiler, "-E", "-"], input=f"#include <{header}>\n".encode(), capture_output=True, check=False
        ).returncode
    ]
    if missing:
        names = " ".join(missing)
        sys.exit(f"tmemfs: the engine cannot be built without the headers of {names}; apt install {names}")


def make_ffi() -> FFI:
    """Return the description of the extension."""
    check_headers()
    ffi = FFI()
    ffi.cdef(declarations())
    flags = shlex.split(os.environ.get("TMEM_CFLAGS", ""))
    sources = sorted(str(path) for path in HERE.glob("*.c"))
    ffi.set_source(
        "tmem._engine",
        PREAMBLE,
        sources=sources,
        include_dirs=[str(HERE)],
        depends=sorted(str(path) for path in HERE.glob("*.h")),
        libraries=["lz4", "xxhash"],
        extra_compile_args=["-std=c11", "-O2", "-g", "-UNDEBUG", "-D_GNU_SOURCE", "-pthread", *flags],
    )
    return ffi
