"""git on a mount: clone, branches, gc, repack, fsck, push, and the repository in the backing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.apps.programs import Options
from tests.mounted import Mounted, needs, shell

pytestmark = [pytest.mark.mount, needs("git")]
FILES = 100
TREES = """
find . -name .git -prune -o -printf '%P %y %m %l\\n' | sort
find . -name .git -prune -o -type f -print0 | sort -z | xargs -0 sha256sum
"""


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """Create a repository with a history: changes, renames, deletions, large files, a merge, tags."""
    generator = random.Random(5)
    words = [f"word{n}" for n in range(500)]
    top = tmp_path / "origin"
    for number in range(FILES):
        path = top / f"d{number % 12}" / f"e{number % 5}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(generator.choices(words, k=9)) + "\n" for _ in range(generator.randrange(90))))
    for number in range(3):
        (top / f"large{number}").write_bytes(generator.randbytes(500_000))
    (top / "d0" / "run.sh").write_text("#!/bin/sh\necho run\n")
    (top / "d0" / "run.sh").chmod(0o755)
    (top / "link").symlink_to("d0/run.sh")
    shell(
        """
        git init -q -b main .
        git add -A; git commit -q -m one; git tag -a -m first v1
        for i in 1 2 3 4; do
            for f in d$i/*/*.txt; do echo "change $i" >> $f; done
            git commit -q -a -m "change $i"
        done
        git checkout -q -b side v1
        git mv d5 moved; git rm -q -r d6; head -c 200000 /dev/urandom >> large1; chmod -x d0/run.sh
        git commit -q -a -m side
        git checkout -q -b other main~2 && echo other > d7/other; git add -A; git commit -q -m other
        git checkout -q main; git merge -q --no-edit other
        """,
        top,
    )
    return top


def test_a_clone_lives_on_the_mount(mounted: Mounted, writing: Options, origin: Path, tmp_path: Path) -> None:
    root = mounted.start(*writing)
    shell('git clone -q "file://$FROM" clone', root, FROM=origin)
    clone, plain = root / "clone", tmp_path / "plain"
    shell('git clone -q "file://$FROM" "$TO"', origin, FROM=origin, TO=plain)
    for branch in ("side", "v1", "other", "main"):
        for place in (clone, plain):
            shell(f'git checkout -q {branch}; git diff --quiet HEAD; test -z "$(git status --porcelain)"', place)
        assert shell(TREES, clone) == shell(TREES, plain)
    shell(
        """
        git checkout -q -b mine
        for i in 1 2 3; do
            for f in d1/*/*.txt; do echo "mine $i" >> $f; done
            git commit -q -a -m "mine $i"
        done
        git reset -q --hard HEAD~1
        echo stashed > stashed
        git add stashed
        git stash -q
        git stash drop -q
        git rebase -q side
        git checkout -q main
        git reflog expire --expire=now --all
        git gc -q --prune=now
        git repack -q -a -d -f --depth=20 --window=5
        git fsck --full --strict
        git count-objects -v | grep -qx 'count: 0'
        git worktree add -q ../work mine
        git -C ../work status --porcelain > ../status
        test ! -s ../status
        git init -q --bare ../bare.git
        git push -q ../bare.git main mine side
        git -C ../bare.git fsck --full --strict
        git clone -q --no-local ../bare.git ../again -b mine
        test "$(git -C ../again rev-parse HEAD)" = "$(git rev-parse mine)"
        git status --porcelain > ../status
        test ! -s ../status
        """,
        clone,
    )
    assert mounted.stats()["cache_evictions"] > 500
    mounted.end()
    for name in ("clone", "bare.git", "again"):
        shell("git fsck --full --strict", mounted.source / name)
    shell("git status --porcelain > ../status; test ! -s ../status", mounted.source / "clone")
    shell("git checkout -q main", plain)
    assert shell(TREES, mounted.source / "clone") == shell(TREES, plain)
