# chatcore. `make help` lists the targets.
#
# All targets build into .venv; a stamp file in it makes the next start fast. The package is installed editable: a
# changed Python file takes effect at once, and make compiles the C parts again when one of their sources is newer.

PYTHON ?= python3
ARGS ?=
# Tests that run at the same time; more than cores, as most tests wait.
JOBS ?= 3

VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
BUILT_DEV := $(VENV)/.built-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
NATIVE := setup.py pyproject.toml $(wildcard chatcore/_fast/*.pyx chatcore/_fast/*.pxd chatcore/_fast/*.pxi chatcore/_fast/*.h)

# What this machine lacks, in one line, with Debian's names of the packages; empty if it lacks nothing.
MISSING = $(shell \
	command -v $(PYTHON) >/dev/null || { echo 'Python is missing: apt install python3'; exit; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): set PYTHON=..."; exit; }; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo 'the Python module venv is missing: apt install python3-venv'; exit; }; \
	cc=$${CC:-$$($(PYTHON) -c 'import sysconfig; print((sysconfig.get_config_var("CC") or "cc").split()[0])')}; \
	command -v $$cc >/dev/null || { echo "a C compiler ($$cc) is missing: apt install build-essential"; exit; }; \
	$$cc -fsyntax-only -include stdio.h -x c /dev/null 2>/dev/null || \
		{ echo 'the headers of the C library are missing: apt install build-essential'; exit; }; \
	test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
		{ echo 'the header Python.h is missing: apt install python3-dev'; exit; })

.PHONY: help
help:
	@echo 'make serve   build, and serve on 127.0.0.1:8080 (ARGS="--port 9000 --workers 2 --data ./data")'
	@echo 'make test    run all tests (ARGS="-k name -x")'
ifneq ($(wildcard perf/__main__.py),)
	@echo 'make bench-setup   install and build the servers to compare with'
	@echo 'make bench   run all benchmarks and write perf/REPORT.md (ARGS="fanout --quick": only one of them)'
endif
	@echo 'make faults  run the fault campaign, an hour (ARGS="--backend sqlite-local --seed 1"; --help says more)'
	@echo 'make lint    check style and types'
	@echo 'make build   build into .venv only'
	@echo 'make clean   remove all build results (not ./data)'

# Ctrl-C reaches the server, too; it drains and exits with 0, so that make reports no error.
.PHONY: serve
serve: $(BUILT)
	@exec $(BIN)/chatcore serve $(ARGS)

.PHONY: test
test: $(BUILT_DEV)
	@$(BIN)/python -m tests.services.mongodb
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

ifneq ($(wildcard perf/__main__.py),)
.PHONY: bench
bench: $(BUILT_DEV)
	@$(BIN)/python -m perf $(or $(ARGS),report)

.PHONY: bench-setup
bench-setup: $(BUILT_DEV)
	@$(PIP) --no-build-isolation --editable '.[dev,perf]'
	@$(BIN)/python -m perf.peers.setup
endif

.PHONY: faults
faults: $(BUILT_DEV)
	@$(BIN)/python -m tests.services.mongodb
	@$(BIN)/python -m tests.faults $(ARGS)

.PHONY: lint
lint: $(BUILT_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: build
build: $(BUILT)

$(BUILT): $(NATIVE)
	@$(if $(MISSING),$(error chatcore cannot be built: $(MISSING)))
	@echo 'building chatcore in $(VENV) (the first time takes a minute)' >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) 'setuptools>=77' 'cython>=3.1'
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(BUILT_DEV): $(BUILT)
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

.PHONY: clean
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f chatcore/_fast/*.so chatcore/_fast/*.c chatcore/_fast/*.html
	find chatcore tests -name __pycache__ -type d -prune -exec rm -rf {} +
