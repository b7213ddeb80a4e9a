# Everything from a fresh checkout: each target sets up what it needs, and is quick once that is done.
#
#   PYTHON=python3.12   which Python makes the environment (3.11 to 3.13)
#   TORCH=torch==2.12.0 another torch
#   TORCH_INDEX=URL     take torch from this package index (scripts/install-torch says when that is needed)
#   ARGS="..."          options for chat and test:  make chat ARGS="--doc notes.txt"
#   FULL="test_x*.py"   test files of which `make test` runs everything, as test-all does of each (tests/thinning.py)

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
MODEL := smollm2-135m

# Threads that stay on their core: without it the CPU kernels are several times slower.
export OMP_PROC_BIND := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TORCH TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help chat test test-all gpu-check lint clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

chat: $(VENV)/.installed ## chat with the default model; options in ARGS
	@$(PY) chat.py $(ARGS)

# In as many processes as there are cores, each on a core of its own (tests/conftest.py).
IN_PARALLEL := -n auto --dist worksteal

test: $(VENV)/.developed ## run the tests, some of which stand for many; pytest options in ARGS
	@$(BIN)/duolocal models fetch $(MODEL)
	$(PY) -m pytest $(or $(ARGS),$(IN_PARALLEL)) $(FULL:%=--full '%')

test-all: FULL := *
test-all: test ## run all tests, with more examples and more of the real model: half an hour on two cores

# On a machine that may have no network: with its own python3 where that sees a GPU, else with our environment.
gpu-check: ## test and measure the GPU kernels on a CUDA device; options in ARGS
	@for python in python3 $(PY); do \
	  if $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    exec $$python -m duolocal.bench gpu $(ARGS); \
	  fi; \
	done; \
	echo "gpu-check: neither python3 nor $(PY) has a torch that sees a CUDA device: nothing was measured"

lint: $(VENV)/.developed ## check style, types and the floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove what builds, tests and linters leave (models and .venv stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# Stamps: one per step of the set-up, renewed when what the step reads has changed.
$(VENV)/.python:
	@scripts/make-venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python scripts/install-torch
	@scripts/install-torch $(PY)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PY) -m pip install --quiet -e ".[documents]"
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(PY) -m pip install --quiet -e ".[test,lint]"
	@touch $@
