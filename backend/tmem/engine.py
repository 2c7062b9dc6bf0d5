"""The C engine, as cffi offers it. This is the only module that imports the extension.

`lib` has the functions of backend/engine/engine.h. cffi releases the interpreter's lock at each call. A buffer is
passed as `ffi.from_buffer(...)`; bytes are passed as they are.
"""

from __future__ import annotations

from typing import Any

from tmem import _engine

ffi: Any = _engine.ffi
lib: Any = _engine.lib

MAX_READ_PAGES: int = lib.TMEM_MAX_READ
MAX_HELD_SLABS: int = lib.TMEM_MAX_SLABS
