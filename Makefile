# Every target prepares what it needs: Python 3.11 or newer, make and a package index are enough.
# Variables given on the command line reach the commands: `make prove LONG=1`, `make test ARGS="-k once"`.

# The first Python that can make a virtual environment; the tested version is preferred.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; \
	done)
PY := .venv/bin/python
EXTRAS := rabbitmq,kafka,postgresql,mysql,sqlite,redis,http
# Directories with Python files, of those that mypy covers.
TYPED := $(foreach d,idemq tests examples benchmarks prove,$(if $(wildcard $(d)/*.py $(d)/*/*.py),$(d)))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help demo test check hazards prove bench clean python

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/.core ## run the main job on the embedded broker and SQLite, with a worker killed half way
	@$(PY) -m idemq demo

test: .venv/.dev ## run the tests; those that need a missing Docker engine are skipped
	@$(PY) -m pytest -n 3 --dist worksteal $(ARGS)

check: .venv/.dev ## linter, format, types, layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(TYPED)
	.venv/bin/lint-imports

hazards: .venv/.dev ## list what can go wrong, and the tests that prove the answers
	@$(PY) -m tests.hazards

prove: .venv/.dev ## kill, poison and cut off workers and count what was lost or doubled (LONG=1: for hours)
	@$(PY) -m prove

bench: .venv/.dev ## compare with hand-written loops, and what a failing message costs (LONG=1: more messages)
	@$(PY) -m benchmarks
	@$(PY) -m benchmarks.failing

clean: ## remove everything that the targets above made
	rm -rf .venv .demo .prove .bench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build

python: # is there one that will do? For .ci/run
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer with venv (Debian: apt install python3-venv)" >&2; exit 1; }

# One environment in two steps, because the demo needs no development tools. It is made anew when
# pyproject.toml changes, so that nothing stays in it which the project no longer names.
.venv/.core: pyproject.toml | python
	@echo "installing idemq into .venv"
	@$(PYTHON) -m venv --clear .venv
	@$(PY) -m pip install --quiet --upgrade 'pip>=25.1'  # the first pip that knows --group
	@$(PY) -m pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.core
	@echo "installing drivers and development tools into .venv"
	@$(PY) -m pip install --quiet --editable '.[$(EXTRAS)]' --group dev
	@touch $@
