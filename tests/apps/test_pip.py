"""pip installs a package on a mount; Python imports it from there and stores its bytecode there."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from tests.apps.programs import Options
from tests.mounted import Mounted, shell

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="missing: pip"),
]
MODULES = 60
DATA = bytes(range(256)) * 8000
PIP = '"$PYTHON" -m pip --disable-pip-version-check --no-input -q'
IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib, importlib, json, pathlib, tinypackage
modules = [importlib.import_module(f"tinypackage.m{n}") for n in range(60)]
data = (pathlib.Path(tinypackage.__file__).parent / "data.bin").read_bytes()
print(json.dumps({
    "file": tinypackage.__file__,
    "sum": sum(module.VALUE for module in modules),
    "data": hashlib.sha256(data).hexdigest(),
    "cached": [module.__cached__ for module in modules],
}))
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Build a wheel of many modules, data and a script."""
    files = {"tinypackage/__init__.py": b"", "tinypackage/data.bin": DATA}
    for number in range(MODULES):
        body = "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(100))
        files[f"tinypackage/m{number}.py"] = f"VALUE = {number}\n{body}".encode()
    files["tinypackage/main.py"] = b"def main():\n    print('hello from the mount')\n"
    about = "tinypackage-1.0.dist-info"
    files[f"{about}/METADATA"] = b"Metadata-Version: 2.1\nName: tinypackage\nVersion: 1.0\n"
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/entry_points.txt"] = b"[console_scripts]\ntinyhello = tinypackage.main:main\n"
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    files[f"{about}/RECORD"] = f"{record}{about}/RECORD,,\n".encode()
    path = tmp_path / "tinypackage-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def imported(site: Path, program: Path, python: str = sys.executable) -> list[str]:
    """Import everything in a new Python process, check it, and return the paths of its bytecode."""
    command = 'unset PYTHONDONTWRITEBYTECODE; "$PYTHON" -P -s "$PROGRAM" "$SITE"'
    printed = shell(command, program.parent, PYTHON=python, PROGRAM=program, SITE=site)
    seen = json.loads(printed)
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["sum"] == sum(range(MODULES))
    assert seen["data"] == hashlib.sha256(DATA).hexdigest()
    cached: list[str] = seen["cached"]
    return cached


def test_pip_installs_into_a_target(mounted: Mounted, writing: Options, wheel: Path, tmp_path: Path) -> None:
    program = tmp_path / "imports.py"
    program.write_text(IMPORT)
    root = mounted.start(*writing)
    shell(
        f'{PIP} install --no-index --no-deps --no-compile --target site "$WHEEL"',
        root,
        PYTHON=sys.executable,
        WHEEL=wheel,
    )
    site = root / "site"
    assert not (site / "tinypackage" / "__pycache__").exists()
    cached = [Path(name) for name in imported(site, program)]
    written = {path: path.stat().st_mtime_ns for path in cached}
    assert all(path.is_relative_to(site) for path in cached)
    imported(site, program)
    assert {path: path.stat().st_mtime_ns for path in cached} == written, "bytecode is reused"
    module = site / "tinypackage" / "m0.py"
    module.write_text(module.read_text().replace("VALUE = 0", "VALUE = 0 + 0"))
    imported(site, program)
    changed = [path for path in cached if path.stat().st_mtime_ns != written[path]]
    assert changed == [cached[0]], "only changed modules are compiled again"
    assert mounted.stats()["cache_evictions"] > 100
    mounted.end()
    imported(mounted.source / "site", program)
    assert len(list((mounted.source / "site" / "tinypackage" / "__pycache__").glob("m*.pyc"))) == MODULES


def test_a_virtual_environment_lives_on_the_mount(
    mounted: Mounted, writing: Options, wheel: Path, tmp_path: Path
) -> None:
    program = tmp_path / "imports.py"
    program.write_text(IMPORT)
    root = mounted.start(*writing)
    shell('"$PYTHON" -m venv --without-pip env', root, PYTHON=sys.executable)
    python = root / "env" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = root / "env" / "lib" / version / "site-packages"
    install = f'{PIP} --python "$ENV" install --no-index --no-deps "$WHEEL"'
    shell(install, root, PYTHON=sys.executable, ENV=python, WHEEL=wheel)
    imported(site, program, os.fspath(python))
    assert shell("env/bin/tinyhello", root) == "hello from the mount\n"
    again = install.replace("--no-deps", "--no-deps --force-reinstall")
    shell(again, root, PYTHON=sys.executable, ENV=python, WHEEL=wheel)
    imported(site, program, os.fspath(python))
    shell(f'{PIP} --python "$ENV" uninstall -y tinypackage', root, PYTHON=sys.executable, ENV=python)
    assert not list(site.glob("tinypackage*"))
    assert not (root / "env" / "bin" / "tinyhello").exists()
    mounted.end()
    assert not list((mounted.source / "env").rglob("tiny*"))
