# Everything runs in .venv, which is made on first use. Needs Python >= 3.11, its venv module, make.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST := $(PY) -m pytest
# One thread per process: the tests start several processes on few cores.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A stamp beside an interpreter that does not run (a moved or half-deleted folder) is stale.
ifneq ($(shell $(PY) -c 'print(1)' 2>/dev/null),1)
  $(shell rm -f $(STAMP))
endif

.PHONY: help setup demo test test-slow soak lint format docs bench-quick clean

help:
	@echo "make setup        virtual environment with the tested versions"
	@echo "make demo         a small MoE trains, loses a node in plain sight, and goes on"
	@echo "make test         unit, property, fault and integration tests, under 6 minutes"
	@echo "make test-slow    the long ones, the fault matrix among them"
	@echo "make soak         runs under faults for minutes, 25 in all; test-slow has shorter ones"
	@echo "make lint         ruff, mypy --strict, import contracts, the map of rooms"
	@echo "make docs         the documentation as a site in build/site; broken links fail"
	@echo "make bench-quick  real runs under faults against baselines, up to 12 minutes"

setup: $(STAMP)

# The stamp is written last: without it the environment is half made, or older than these files.
$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh
	@bash tools/make_venv.sh $(VENV)
	@touch $(STAMP)

demo: $(STAMP)
	@$(PY) -m lazarus demo

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

# Seconds of each of the two runs under mixed faults.
soak: export LAZARUS_SOAK_S ?= 600
soak: $(STAMP)
	$(PYTEST) -m soak $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) tools/rooms.py

# The site's own packages are installed when it is first built.
DOCS_STAMP := $(VENV)/.installed-docs
$(DOCS_STAMP): $(STAMP)
	@$(PY) -m pip install --quiet --prefer-binary -c constraints.txt -e '.[docs]'
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	@$(PY) tools/build_docs.py

format: $(STAMP)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Interpreters that have the real peers; one without is skipped, and the output says so.
DS_PYTHON ?= $(PY)
FT_PYTHON ?= $(PY)
bench-quick: $(STAMP)
	$(PY) benchmarks/goodput_under_faults.py --quick --ds-python $(DS_PYTHON) --ft-python $(FT_PYTHON)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
