"""Ownership and permissions for callers that are not root: as on the backing.

The same steps run in a child with other credentials, once in the mount and once in a plain directory. Both results
must be equal and right.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SECONDS, run
from tests.mounted import Mounted

pytestmark = [pytest.mark.mount, pytest.mark.root]
OPEN = ("-o", "allow_other,suid,dev")
ALICE, BOB, STAFF, TEAM = 12_001, 12_002, 13_001, 13_002
acl = pytest.mark.skipif(shutil.which("setfacl") is None, reason="setfacl (package acl) is missing")


def as_user(uid: int, gid: int, groups: list[int], cwd: Path, code: str) -> object:
    """Run Python as a user, in a directory; return what it assigned to `found`, or the name of the errno."""
    script = f"""
import errno, json, os, socket, stat, subprocess
os.chdir({os.fspath(cwd)!r})
os.setgroups({groups!r}); os.setgid({gid}); os.setuid({uid})
found = None
try:
{"".join(f"    {line}{chr(10)}" for line in code.strip().splitlines())}
except OSError as error:
    found = errno.errorcode[error.errno]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120, check=False, env={}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def both(mounted: Mounted, plain: Path, uid: int, gid: int, groups: list[int], code: str) -> object:
    """Run the code in the mount and in the plain directory; return the result of both, which must be equal."""
    in_mount = as_user(uid, gid, groups, mounted.root, code)
    assert in_mount == as_user(uid, gid, groups, plain, code), "the plain directory gives another result"
    return in_mount


@pytest.fixture
def plain(mounted: Mounted) -> Path:
    """Return a plain directory that every user may write to, and make the source one, too."""
    directory = mounted.source.parent / "plain"
    directory.mkdir()
    for path in (directory, mounted.source):
        path.chmod(0o777)
    return directory


def prepare(mounted: Mounted, plain: Path, *words: str) -> None:
    """Run a command in the source and in the plain directory, before the mount."""
    for directory in (mounted.source, plain):
        done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr


# -- owners ----------------------------------------------------------------------------------------------------------

MAKE_ALL = """
os.umask(0o027)
os.close(os.open('f', os.O_CREAT | os.O_WRONLY, 0o666))
os.mkdir('d', 0o777)
os.symlink('f', 's')
os.mkfifo('p', 0o666)
os.mknod('n', stat.S_IFREG | 0o666)
socket.socket(socket.AF_UNIX).bind('k')
found = [[name, st.st_uid, st.st_gid, stat.filemode(st.st_mode)] for name in 'fdspnk' for st in [os.lstat(name)]]
"""


def test_new_nodes_belong_to_the_caller_with_its_umask(mounted: Mounted, plain: Path) -> None:
    mounted.start(*OPEN)
    found = both(mounted, plain, ALICE, STAFF, [], MAKE_ALL)
    assert isinstance(found, list)
    assert {(uid, gid) for _, uid, gid, _ in found} == {(ALICE, STAFF)}
    assert [mode for _, _, _, mode in found] == [
        "-rw-r-----",
        "drwxr-x---",
        "lrwxrwxrwx",
        "prw-r-----",
        "-rw-r-----",
        "srwxr-x---",
    ]


def test_a_file_hidden_by_a_negative_entry_is_opened_by_its_mode(mounted: Mounted, plain: Path) -> None:
    root = mounted.start(*OPEN, "--negative-timeout", "10m")
    assert not (root / "f").exists()
    assert not (root / "g").exists()
    for directory in (mounted.source, plain):
        for name, mode in (("f", 0o600), ("g", 0o666)):
            (directory / name).write_text("of root")
            (directory / name).chmod(mode)
    code = "found = os.read(os.open({name!r}, os.O_CREAT | os.O_RDWR, 0o644), 100).decode()"
    assert both(mounted, plain, ALICE, STAFF, [], code.format(name="f")) == "EACCES"
    assert both(mounted, plain, ALICE, STAFF, [], code.format(name="g")) == "of root"


def test_a_set_group_id_directory_gives_its_group(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "mkdir", "-m", "2777", "shared")
    prepare(mounted, plain, "chgrp", str(TEAM), "shared")
    prepare(mounted, plain, "chmod", "2777", "shared")
    mounted.start(*OPEN)
    found = both(mounted, plain, ALICE, STAFF, [], "os.chdir('shared')\n" + MAKE_ALL)
    assert isinstance(found, list)
    assert {(uid, gid) for _, uid, gid, _ in found} == {(ALICE, TEAM)}
    assert {name: mode for name, _, _, mode in found}["d"] == "drwxr-s---"


def test_setgid_is_cleared_for_a_group_that_the_caller_is_not_in(mounted: Mounted, plain: Path) -> None:
    """Linux clears the bit of a new executable whose group the caller is not in."""
    prepare(mounted, plain, "mkdir", "shared")
    prepare(mounted, plain, "chgrp", str(TEAM), "shared")
    prepare(mounted, plain, "chmod", "2777", "shared")
    mounted.start(*OPEN)
    make = (
        "os.umask(0)\nos.close(os.open('shared/x%d', os.O_CREAT | os.O_WRONLY, 0o2775))\n"
        "found = stat.filemode(os.stat('shared/x%d').st_mode)"
    )
    assert both(mounted, plain, ALICE, STAFF, [TEAM], make % (1, 1)) == "-rwxrwsr-x"
    assert both(mounted, plain, ALICE, STAFF, [], make % (2, 2)) == "-rwxrwxr-x"


def test_supplementary_groups_give_and_deny_access(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "sh", "-c", f"echo secret > f; chgrp {TEAM} f; chmod 640 f; mkdir d; chgrp {TEAM} d")
    prepare(mounted, plain, "sh", "-c", "chmod 770 d; echo other > o; chown 12001 o; chmod 604 o")
    mounted.start(*OPEN)
    read, make = "found = open('f').read()", "open('d/new', 'w').close(); found = os.stat('d/new').st_gid"
    assert both(mounted, plain, BOB, STAFF, [TEAM], read) == "secret\n"
    assert both(mounted, plain, BOB, STAFF, [], read) == "EACCES"
    assert both(mounted, plain, BOB, STAFF, [TEAM], make) == STAFF
    assert both(mounted, plain, BOB, STAFF, [], make) == "EACCES"
    assert both(mounted, plain, BOB, STAFF, [TEAM], "found = open('f', 'a').close()") == "EACCES"
    give = "os.chown('mine', -1, %d); found = os.stat('mine').st_gid"
    both(mounted, plain, BOB, STAFF, [], "open('mine', 'w').close()")
    assert both(mounted, plain, BOB, STAFF, [TEAM], give % TEAM) == TEAM
    assert both(mounted, plain, BOB, STAFF, [], give % 13_009) == "EPERM"
    assert both(mounted, plain, ALICE, STAFF, [], "os.chmod('mine', 0o777)") == "EPERM"


def test_a_sticky_directory_protects_names(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "sh", "-c", f"mkdir -m 1777 t; touch t/f; chown {ALICE} t/f")
    mounted.start(*OPEN)
    assert both(mounted, plain, BOB, STAFF, [], "os.unlink('t/f')") in ("EPERM", "EACCES")
    assert both(mounted, plain, BOB, STAFF, [], "os.rename('t/f', 't/g')") in ("EPERM", "EACCES")
    assert both(mounted, plain, ALICE, STAFF, [], "os.rename('t/f', 't/g'); found = os.listdir('t')") == ["g"]


def test_a_write_by_an_ordinary_user_clears_setuid(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "sh", "-c", f"touch f; chown {ALICE}:{STAFF} f; chmod 6777 f")
    mounted.start(*OPEN)
    write = "open('f', 'a').write('x'); found = stat.filemode(os.stat('f').st_mode)"
    assert both(mounted, plain, BOB, STAFF, [], write) == "-rwxrwxrwx"


# -- ACLs ------------------------------------------------------------------------------------------------------------


@acl
def test_a_mask_does_not_override_the_denial_of_the_group_entry(mounted: Mounted, plain: Path) -> None:
    """group::--- with a mask of rw-: the mode's group bits show the mask, but the owning group is denied."""
    prepare(mounted, plain, "sh", "-c", f"echo secret > f; chown {ALICE}:{TEAM} f; chmod 600 f")
    prepare(mounted, plain, "setfacl", "-m", f"u:{BOB}:rw-,g::---,m::rw-", "f")
    assert (mounted.source / "f").stat().st_mode & 0o777 == 0o660
    mounted.start(*OPEN)
    read = "found = open('f').read()"
    assert both(mounted, plain, 12_009, TEAM, [], read) == "EACCES"
    assert both(mounted, plain, 12_009, STAFF, [TEAM], read) == "EACCES"
    assert both(mounted, plain, BOB, STAFF, [], read) == "secret\n"
    assert both(mounted, plain, BOB, TEAM, [TEAM], read) == "secret\n"
    assert both(mounted, plain, ALICE, STAFF, [], read) == "secret\n"
    assert both(mounted, plain, 12_009, STAFF, [], read) == "EACCES"


@acl
def test_acls_set_through_the_mount_count_at_once_and_are_the_backings(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "sh", "-c", f"echo secret > f; chown {ALICE}:{STAFF} f; chmod 640 f")
    mounted.start(*OPEN)
    read = "found = open('f').read()"
    assert both(mounted, plain, BOB, TEAM, [], read) == "EACCES"
    for directory in (mounted.root, plain):
        assert run("setfacl", "-m", f"u:{BOB}:r--", directory / "f").returncode == 0
    assert both(mounted, plain, BOB, TEAM, [], read) == "secret\n"
    acls = [run("getfacl", "-n", "--omit-header", at / "f").stdout for at in (mounted.root, mounted.source, plain)]
    assert acls[0] == acls[1] == acls[2]
    assert f"user:{BOB}:r--" in acls[0]
    for directory in (mounted.root, plain):
        (directory / "f").chmod(0o600)  # the mask
    assert both(mounted, plain, BOB, TEAM, [], read) == "EACCES"
    for directory in (mounted.root, plain):
        assert run("setfacl", "-b", directory / "f").returncode == 0
    assert both(mounted, plain, BOB, TEAM, [], read) == "EACCES"
    assert [name for name in os.listxattr(mounted.root / "f") if "acl" in name] == []


@acl
def test_default_acls_are_inherited_and_the_umask_is_not_applied(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "mkdir", "-m", "777", "d")
    prepare(mounted, plain, "setfacl", "-d", "-m", f"u::rwx,u:{BOB}:rwx,g::rwx,o::r-x,m::rwx", "d")
    mounted.start(*OPEN)
    make = """
os.umask(0o077)
os.close(os.open('d/f', os.O_CREAT | os.O_WRONLY, 0o666))
os.mkdir('d/e', 0o777)
os.mkfifo('d/p', 0o622)
os.close(os.open('d/e/g', os.O_CREAT | os.O_WRONLY, 0o640))
names = ('d/f', 'd/e', 'd/p', 'd/e/g')
found = [[name, stat.filemode(st.st_mode), st.st_uid, st.st_gid] for name in names for st in [os.stat(name)]]
"""
    found = both(mounted, plain, ALICE, STAFF, [], make)
    assert isinstance(found, list)
    assert [mode for _, mode, _, _ in found] == ["-rw-rw-r--", "drwxrwxr-x", "prw--w----", "-rw-r-----"]
    assert {(uid, gid) for _, _, uid, gid in found} == {(ALICE, STAFF)}
    for name in ("d/f", "d/e", "d/p", "d/e/g"):
        acls = [run("getfacl", "-n", "-p", "--omit-header", at / name).stdout for at in (mounted.root, plain)]
        assert acls[0] == acls[1]
    without = """
os.umask(0o077)
os.close(os.open('h', os.O_CREAT | os.O_WRONLY, 0o666))
found = stat.filemode(os.stat('h').st_mode)
"""
    assert both(mounted, plain, ALICE, STAFF, [], without) == "-rw-------"
    assert both(mounted, plain, BOB, TEAM, [], "open('d/f', 'w').write('x'); found = open('d/f').read()") == "x"


@acl
def test_setting_an_acl_clears_setgid_if_the_setter_is_not_in_the_group(mounted: Mounted, plain: Path) -> None:
    prepare(mounted, plain, "sh", "-c", f"mkdir d; touch f; chown {ALICE}:{TEAM} d f")
    mounted.start(*OPEN)
    change = f"""
found = []
for name in ('f', 'd'):
    subprocess.run(['setfacl', '-m', 'u:{BOB}:r%s', name], check=True, env=dict(PATH='/usr/bin:/bin'))
    found.append(stat.filemode(os.stat(name).st_mode))
"""
    for directory in (mounted.root, plain):
        for name in ("f", "d"):
            (directory / name).chmod(0o2775)
    assert both(mounted, plain, ALICE, STAFF, [TEAM], change % "-x") == ["-rwxrwsr-x", "drwxrwsr-x"]
    assert both(mounted, plain, ALICE, STAFF, [], change % "wx") == ["-rwxrwxr-x", "drwxrwxr-x"]
