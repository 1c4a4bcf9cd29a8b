# Every target makes .venv and installs r1v3 into it first; later runs reuse it.
# PYTHON=/path/to/python3.11+ chooses the interpreter.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo base test test-all test-stacks lint bench install clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done
PYTHON ?= $(shell $(FIND_PYTHON))

demo: $(STAMP)
	$(BIN)/r1v3 demo

# One torch thread per worker: two workers use two cores without fighting for them. Where a test
# asks for more threads, those that wait yield.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST)

# With the exhaustive forms of tests that `test` leaves out.
test-all: $(STAMP)
	$(PYTEST) -m "slow or not slow"

# r1v3 inside the real TRL, transformers, ...: an environment for each under .venvs, made once.
# STACKS="trl" chooses.
test-stacks: $(STAMP)
	$(BIN)/python -m tests_stacks.environments $(STACKS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy r1v3

# Pre-trains the demo's base model again, about half an hour on two cores.
base: $(STAMP)
	$(BIN)/r1v3 data configs/base/data.yaml
	$(BIN)/r1v3 sft configs/base/sft.yaml
	$(BIN)/r1v3 sft configs/base/skills.yaml
	$(BIN)/r1v3 sft configs/base/explained.yaml

bench: $(STAMP)
	$(BIN)/python -m benchmarks

install: $(STAMP)

# torch comes first and alone: a package that asks for any torch must not choose another one.
$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
		echo "r1v3 needs Python 3.11 or newer with venv; none was found. Set PYTHON=..." >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
		echo "r1v3 needs a C++17 compiler (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel pybind11
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,serve,dev]'
	$(BIN)/python -c 'import r1v3._C'
	@touch $(STAMP)

clean:
	rm -rf build *.egg-info r1v3/_C.*.so .pytest_cache .mypy_cache .ruff_cache
