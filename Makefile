# make run        show what the cache does on a slow directory
# make test       run the tests
# make test-slow  run the tests that take minutes: PostgreSQL, a million lookups
# make check      run ruff and mypy
# make sanitize [SANITIZE_SECONDS=60]
#                 run the C tests of the engine under ASan and UBSan, and under TSan; `make test` does so, shortly
# make bench [TRACES=DIR]        run all benchmarks (ten minutes); results in bench/results/index.html
# make bench-quick [TRACES=DIR]  the same on a small scale (a minute), to see that they work
# make torture [SECONDS=60] [SEED=N] [MODE=writeback] [PROCESSES=1]
#                 compare random operations on a mount with a plain directory; SEED repeats one run
# make setup      only install, and build the engine; then there is .venv/bin/tmemfs
# make setup DEBUG=1  the same; mounts check the tables of the engine at their end
# make wheel      build a wheel into dist/
# make clean      remove .venv, the engine, wheels, build files and caches
#
# Each target installs first what is missing: system packages with apt-get, everything else into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:

VENV := .venv
STAMP := $(VENV)/.installed
ENGINE := $(VENV)/.engine$(if $(DEBUG),-debug)
CODE := tmemfs backend tests $(wildcard bench)
PACKAGES := fuse3 libfuse3-dev pkg-config gcc libc6-dev make git python3-venv python3-dev fio acl attr rsync bindfs \
    liblz4-dev libxxhash-dev
# Warnings are errors here, but not for those who install a wheel.
export TMEM_CFLAGS := -Wall -Wextra -Wconversion -Werror $(if $(DEBUG),-DTMEM_DEBUG)
PEERS := rclone redis-server memcached zstd

.PHONY: run test test-slow check bench bench-quick peers torture sanitize setup wheel clean

run: setup
	@exec $(VENV)/bin/python -m bench.demo

# tests/swap turns swap on for the whole machine, so it runs after the others, one test at a time.
test: setup
	@$(VENV)/bin/python -m pytest -m "not slow" -n 2 --dist worksteal --ignore tests/swap
	$(VENV)/bin/python -m pytest -m "not slow" tests/swap

test-slow: setup
	@SLOW=1 exec $(VENV)/bin/python -m pytest -m slow --timeout 1200

check: setup
	@$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy --strict $(CODE)

bench bench-quick: setup peers
	@exec $(VENV)/bin/python -m bench $(if $(filter bench-quick,$@),--quick) $(if $(TRACES),--traces '$(TRACES)')

# Programs that the benchmarks compare with. A benchmark whose program is missing is skipped, with a message.
peers:
	@missing=()
	for package in $(PEERS); do
	    command -v "$$package" > /dev/null || missing+=("$$package")
	done
	[ "$${#missing[@]}" -gt 0 ] || exit 0
	sudo=()
	[ "$$(id -u)" -eq 0 ] || sudo=(sudo -n)
	echo "installing $${missing[*]} to compare with"
	export DEBIAN_FRONTEND=noninteractive
	if ! { "$${sudo[@]}" apt-get update -q && "$${sudo[@]}" apt-get install -q -y --no-install-recommends \
	    "$${missing[@]}"; } > /dev/null 2>&1; then
	    echo "could not install all of them: benchmarks that need the others are skipped"
	fi

torture: setup
	@exec $(VENV)/bin/python -m tests.torture --seconds $(or $(SECONDS),$(if $(SEED),0,60)) \
	    $(if $(SEED),--seed $(SEED)) $(if $(MODE),--mode $(MODE)) $(if $(PROCESSES),--processes $(PROCESSES))

sanitize: setup
	@exec $(VENV)/bin/python -m tests.engine.sanitize --seconds $(or $(SANITIZE_SECONDS),60)

setup: $(STAMP) $(ENGINE)

wheel: setup
	@rm -rf dist build/wheel
	TMEM_CFLAGS= $(VENV)/bin/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	ls dist/*.whl

# The stamp is written last, so an interrupted installation is repeated.
$(STAMP): requirements.txt pyproject.toml Makefile
	@fail() { echo "make: $$*" >&2; exit 1; }
	missing=()
	if command -v dpkg-query > /dev/null; then
	    for package in $(PACKAGES); do
	        dpkg-query -W -f '$${Status}' "$$package" 2> /dev/null | grep -q ' installed$$' || missing+=("$$package")
	    done
	else
	    for program in fusermount3 pkg-config gcc fio; do
	        command -v "$$program" > /dev/null || missing+=("$$program")
	    done
	fi
	if [ "$${#missing[@]}" -gt 0 ]; then
	    list="$${missing[*]}"
	    command -v apt-get > /dev/null || fail "missing: $$list; install it and run make again (there is no apt-get here)"
	    sudo=()
	    if [ "$$(id -u)" -ne 0 ]; then
	        command -v sudo > /dev/null || fail "missing: $$list; run make again as root, or install sudo"
	        sudo=(sudo)
	    fi
	    echo "installing $$list"
	    log=$$(mktemp)
	    export DEBIAN_FRONTEND=noninteractive
	    "$${sudo[@]}" apt-get update -q > "$$log" 2>&1 || true
	    "$${sudo[@]}" apt-get install -q -y --no-install-recommends "$${missing[@]}" >> "$$log" 2>&1 \
	        || fail "missing: $$list; apt-get could not install it: $$(grep -m1 '^E:' "$$log" || tail -n1 "$$log")"
	    rm -f "$$log"
	fi
	python=
	# The system's Python first: other users could not run one below root's home directory.
	for candidate in /usr/bin/python3 python3 python3.11 python3.12 python3.13 python3.14; do
	    if "$$candidate" -c 'import sys, venv, ensurepip, sysconfig, pathlib; sys.exit(sys.version_info < (3, 11)
	        or not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' 2> /dev/null; then
	        python=$$candidate
	        break
	    fi
	done
	[ -n "$$python" ] || fail "missing: Python 3.11 or newer with venv and headers (apt: python3-venv python3-dev)"
	# --clear replaces an environment of another Python, or an incomplete one.
	"$$python" -m venv --clear $(VENV) || fail "missing: $$python cannot make a virtual environment in $(VENV)"
	echo "installing the Python packages into $(VENV)"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt \
	    || fail "missing: Python packages of requirements.txt; is the package registry reachable?"
	touch $@

# Only this is done again when the engine's sources change.
$(ENGINE): $(STAMP) setup.py $(wildcard backend/engine/*.py backend/engine/*.[ch])
	@echo "building the engine"
	rm -f $(VENV)/.engine*
	log=$$(mktemp)
	if ! $(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e . > "$$log" 2>&1
	then
	    # The one line of build.py, or all that the compiler says.
	    reason=$$(grep -m1 -o 'tmemfs: .*' "$$log") || { cat "$$log" >&2; reason="the engine could not be built, see above"; }
	    rm -f "$$log"
	    echo "make: $$reason" >&2
	    exit 1
	fi
	rm -f "$$log"
	touch $@

clean:
	@rm -rf $(VENV) build dist *.egg-info backend/tmem/_engine*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find tmemfs backend tests $(wildcard bench) -name __pycache__ -prune -exec rm -rf {} +
