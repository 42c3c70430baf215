# SPDX-License-Identifier: Apache-2.0
# What a fresh machine needs is installed on the way: system packages where that is allowed, everything else in $(VENV).
#
#   make test PYTHON=python3.13            another Python
#   make test TORCH=torch==2.11.0          another torch, where the environment has none yet
#   make test VENV=.venv-gpu VENV_ARGS=--system-site-packages    a torch that the system already has
#   make test PYTEST_ARGS="-k engine -x"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
# An exact version, since the newest torch is not the one that was tested, and the same everywhere.
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
FUZZ_SECONDS ?= 60

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export CMAKE_GENERATOR := Ninja
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMPS := build/stamps/$(subst /,_,$(VENV))
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.cu')
BUILD_FILES := CMakeLists.txt pyproject.toml $(wildcard third_party/cmake/*.cmake)

# A stamp outlives a virtual environment that somebody removed: then make it again.
ifeq ($(wildcard $(BIN)/python),)
.PHONY: $(STAMPS)/venv
endif

.PHONY: help
help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do \
	  printf '  make %-12s %s\n' "$$name" "$$text"; done

.PHONY: setup
setup: $(STAMPS)/extension ## Install what is needed and build the extension

.PHONY: demo
demo: $(STAMPS)/extra-demo ## Run a model several times larger than its budget, and check every bit of the output
	$(BIN)/tensorpager demo $(DEMO_ARGS)

.PHONY: demo-train
demo-train: $(STAMPS)/extra-demo ## Train with a quarter of the memory, kill, resume, and check every bit
	$(BIN)/python examples/demo_train.py $(DEMO_ARGS)

.PHONY: test
test: test-cpp test-python ## Run the C++ tests and pytest

.PHONY: test-cpp
test-cpp: cpp-dev ## Run the stand-alone C++ tests, every assertion on

.PHONY: test-python
test-python: test-cpp $(STAMPS)/extra-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: bench
bench: $(STAMPS)/extra-test ## Measure, in interleaved rounds, and print ratios of medians
	$(BIN)/python -m bench $(BENCH_ARGS)

.PHONY: gpu-check
gpu-check: ## On a machine with an NVIDIA GPU: build, run the tests that need it, measure; no network, nothing installed
	$(PYTHON) bench/gpu_check.py $(GPU_CHECK_ARGS)

.PHONY: lint
lint: $(STAMPS)/extra-dev ## Check format, lint and types; change nothing
	@failed=0; check() { echo "$$*" | cut -c -100; "$$@" || failed=1; }; \
	check $(BIN)/ruff format --check .; \
	check $(BIN)/ruff check .; \
	check $(BIN)/clang-format --dry-run --Werror $(CPP_FILES); \
	check $(BIN)/mypy; \
	for script in .ci/run .ci/system-packages; do check bash -n $$script; done; \
	exit $$failed

.PHONY: format
format: $(STAMPS)/extra-dev ## Format every Python and C++ file in place
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

.PHONY: stubs
stubs: $(STAMPS)/extra-dev ## Write python/tensorpager/_core.pyi anew from the built extension
	$(BIN)/python .ci/stubs.py

.PHONY: check-stubs
check-stubs: $(STAMPS)/extra-dev ## Fail when _core.pyi is not what the built extension says
	$(BIN)/python .ci/stubs.py --check

.PHONY: sanitize
sanitize: cpp-asan cpp-tsan ## Run the C++ tests under the address, undefined-behaviour and thread sanitizers

# Address-space randomisation beyond what older thread sanitizers allow for ends the program at its start, so it is
# switched off where that is permitted. Debug builds of the four presets differ in flags alone.
.PHONY: cpp-dev cpp-asan cpp-tsan
cpp-dev cpp-asan cpp-tsan: cpp-%: $(STAMPS)/tools
	cmake --preset $*
	cmake --build --preset $*
	@fixed=""; if [ "$*" = tsan ] && setarch -R true 2>/dev/null; then fixed="setarch -R"; fi; \
	  echo "$$fixed ctest --preset $*"; $$fixed ctest --preset $*

.PHONY: fuzz fuzz-canary
fuzz: $(STAMPS)/extra-test $(STAMPS)/extra-fuzz ## Fuzz the checkpoint header parser for FUZZ_SECONDS (60)
	$(BIN)/python tests/fuzz_checkpoint.py --seconds $(FUZZ_SECONDS)

fuzz-canary: $(STAMPS)/extra-test $(STAMPS)/extra-fuzz ## Fuzz a parser with a planted bug, which must be found
	$(BIN)/python tests/fuzz_checkpoint.py --seconds $(FUZZ_SECONDS) --canary

.PHONY: clean
clean: ## Remove what was built, but not the virtual environment
	rm -rf build dist .demo .demo-train finetune-run \
	  bench/.cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# What the rules above stand on. A stamp's time says when the step was last done.

$(STAMPS)/system: .ci/system-packages
	@mkdir -p $(@D)
	PYTHON=$(PYTHON) .ci/system-packages
	@touch $@

$(STAMPS)/venv: | $(STAMPS)/system
	@mkdir -p $(@D)
	@if [ ! -x $(BIN)/python ]; then echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV_ARGS) $(VENV); fi
	@touch $@

$(STAMPS)/tools: $(STAMPS)/venv pyproject.toml
	$(BIN)/python .ci/install_tools.py
	@touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@if $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then \
	  echo "torch is there: $$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')"; \
	else echo "installing $(TORCH)"; $(PIP) "$(TORCH)"; fi
	@touch $@

# Built without isolation, so that the next build is incremental: build/<wheel tag> keeps the objects.
$(STAMPS)/extension: $(STAMPS)/tools $(BUILD_FILES) $(CPP_FILES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/extra-test $(STAMPS)/extra-demo $(STAMPS)/extra-dev: $(STAMPS)/extra-%: $(STAMPS)/torch $(STAMPS)/extension
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ] || [ $(STAMPS)/venv -nt $@ ]; then \
	  echo "installing the packages of tensorpager[$*]"; $(PIP) --no-build-isolation --editable ".[$*]"; fi
	@touch $@

$(STAMPS)/extra-fuzz: $(STAMPS)/venv pyproject.toml
	$(BIN)/python .ci/install_tools.py --fuzz
	@touch $@
