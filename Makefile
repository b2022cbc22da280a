# make demo | test | bench | leaktest | fuzz | lint | wheel | clean. Needs Python 3.11 or newer, and PyPI to install from once.
#
#   make test PYTHON=python3.13               with another Python, in an environment of its own
#   make test PYTEST_ARGS="-k egress -x"      whatever pytest takes
#   make bench BENCH_ARGS="--only ports"      what a connect costs, beside every peer; writes bench/results
#   make leaktest                             where packets leave, beside curl and aiohttp; FULL=1: the whole product
#   make fuzz FUZZ_SECONDS=600                the grammar and the netlink parser
#   make test-oldest                          the oldest Python with the oldest dependencies

PYTHON ?= python3
PYTHON_OLDEST ?= python3.11
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(subst /,-,$(PYTHON)))
CONSTRAINTS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 60
FULL ?=

py = $(VENV)/bin/python
install = $(py) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# In a user namespace everybody is root, and pytest would look for its temporary folders under that name.
export LOGNAME ?= $(shell id -un)

.NOTPARALLEL:
.PHONY: help demo test test-oldest bench leaktest fuzz lint format wheel clean

help:
	@sed -n '1,/^$$/s/^#\{1,\} \{0,1\}//p' Makefile

demo: $(VENV)/.with-examples,uvloop
	$(py) examples/demo.py

test: $(VENV)/.with-test
	$(py) tests/halves.py $(PYTEST_ARGS)

test-oldest:
	@$(MAKE) --no-print-directory test PYTHON=$(PYTHON_OLDEST) VENV=$(VENV)-oldest CONSTRAINTS=tests/constraints-oldest.txt

bench: $(VENV)/.with-bench
	$(py) -m bench $(BENCH_ARGS)

leaktest: $(VENV)/.with-test
	$(py) tests/leaktable.py $(if $(FULL),--full)

fuzz: $(VENV)/.with-test
	$(py) tests/fuzz.py grammar --seconds $(FUZZ_SECONDS)
	$(py) tests/fuzz.py netlink --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.with-lint
	$(py) -m ruff format --check .
	$(py) -m ruff check .
	$(py) -m mypy
	$(py) -m basedpyright --pythonpath $(py)

format: $(VENV)/.with-lint
	$(py) -m ruff check --fix .
	$(py) -m ruff format .

wheel: $(VENV)/.with-test
	rm -rf dist
	$(py) -m hatchling build -d dist

clean:
	rm -rf .venv* build dist *.egg-info .coverage* .hypothesis .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed lasts until pyproject.toml or the constraints change.
$(VENV)/.with-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@echo "installing aiobind[$*] into $(VENV)"
	@$(install) --editable '.[$*]'
	@touch $@

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo >&2 "There is no $(PYTHON) here: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo >&2 "aiobind needs Python 3.11 or newer, and $(PYTHON) is not ($$($(PYTHON) --version 2>&1 || true))."; \
	  echo >&2 "Name another one: make $(MAKECMDGOALS) PYTHON=python3.13"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo >&2 "$(PYTHON) has no venv module. On Debian and Ubuntu it is in the package python3-venv."; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
