# Every target but device* makes .venv and installs r1v3 into it first; later runs reuse it.
# PYTHON=/path/to/python3.11+ chooses the interpreter.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo studies base test test-all test-stacks lint bench device device-step device-rivals \
	install clean

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

# The report's experiments in their quick form; FULL=1 runs all seeds and steps, for hours.
studies: $(STAMP)
	$(BIN)/r1v3 study configs/studies/{demo,search}/*.yaml $(if $(FULL),,--quick)

# One torch thread per worker, which does not fight with the others. A worker more than there are
# cores, up to four: tests spend a fifth of their time waiting for processes that they start. Where
# a test asks for more threads, those that wait yield. Compiled modules are kept, whatever the shell
# says: tests start a hundred processes that import them.
WORKERS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) < 4 ? $$(getconf _NPROCESSORS_ONLN) + 1 : 4 )))
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest \
	-n $(WORKERS) --dist loadfile --no-loadscope-reorder

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

# Everything that the first ten minutes on a GPU can tell, into device-results/. Nothing is
# installed: it runs as well from a copy without .git on a machine without a network, where COMMIT
# says what is measured. DEVICE=cpu shows the way through it.
ANY_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
COMMIT = $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null)
DEVICE ?= cuda
ON_DEVICE = $(ANY_PYTHON) -m benchmarks.device --device $(DEVICE) $(if $(COMMIT),--commit $(COMMIT))

device:
	$(ON_DEVICE)

# A whole GRPO step, fused head and all logits.
device-step:
	$(ON_DEVICE) training_step --output device-results/step

# What `device` measures r1v3 beside, and what `device-step` imports, for a machine without a
# network: packages that such a machine's image has not, for its Python, into .rivals (a few MB).
DEVICE_PYTHON ?= 3.12
RIVALS := liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 datasets==5.2.0 "dill<0.4.2" \
	"multiprocess<0.70.20" pydantic annotated-types typing-inspection
device-rivals:
	rm -rf .rivals
	$(ANY_PYTHON) -m pip --disable-pip-version-check install --target .rivals --no-deps --no-compile \
		--only-binary=:all: --implementation cp --python-version $(DEVICE_PYTHON) \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -c constraints.txt \
		$(RIVALS) pydantic-core
	du -sh .rivals

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
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,distill,serve,dev]'
	$(BIN)/python -c 'import r1v3._C'
	@touch $(STAMP)

clean:
	rm -rf build device-results *.egg-info r1v3/_C.*.so .pytest_cache .mypy_cache .ruff_cache
