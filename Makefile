# `make` lists the targets. Needed: Python 3.11 or newer, make, bash and a package registry for pip.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup servers demo test test-all test-cluster format lint type check docs constraints image clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The interpreter that makes .venv; by default the first of these that is new enough.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
ARGS ?=
ENGINE ?= docker
IMAGE ?= tl:latest
BASE ?= python:3.11-slim
VARIANT ?= cuda
TORCH_INDEX ?=
EXTRAS ?= image
VERSION = $(shell awk -F '"' '/^version = / { print $$2 }' pyproject.toml)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install everything (2-5 minutes, about 6 GB); again when versions change

# pip prints some thousand lines: one per package is enough, and errors pass untouched.
$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  if ! $(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "tl needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>/dev/null || echo $(or $(PYTHON),no python3))" >&2; \
	    echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
	    exit 2; \
	  fi; \
	  echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "Installing tl and what it needs into $(VENV): 2-5 minutes, about 6 GB (torch with its CUDA libraries)"
	@started=$$SECONDS; \
	pip() { $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$$@" \
	  | awk '/^(Collecting|Installing)/ { print "  " substr($$0, 1, 96); fflush() }'; }; \
	pip setuptools; \
	pip --no-build-isolation -e '.[dev]'; \
	touch $(READY); \
	echo "Installed in $$((SECONDS - started)) s; $(BIN)/tl is ready"

# Debian's names of the packages; psql alone is no server, so look for initdb.
servers: ## what tests of a team's server need: PostgreSQL, Chromium, Caddy (Debian, as root)
	@missing=(); \
	compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null \
	  || missing+=(postgresql); \
	command -v chromium chromium-browser google-chrome >/dev/null || missing+=(chromium); \
	command -v caddy >/dev/null || missing+=(caddy); \
	if [ $${#missing[@]} -gt 0 ]; then \
	  echo "Installing $${missing[*]}"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq >/dev/null; \
	  apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi

demo: $(READY) ## pretrain on digits 0-4, transfer to 5-9: the whole way in under 3 minutes
	@$(BIN)/tl demo $(ARGS)

test: $(READY) ## the tests without the slow ones, in two processes
	$(BIN)/pytest -n2 $(ARGS)

test-all: $(READY) ## all tests, the slow ones too
	$(BIN)/pytest -n2 -m "not cluster" $(ARGS)

test-cluster: $(READY) ## batches on real Slurm and Ray, several hosts, killed jobs (Debian, as root)
	@tests/cluster/install.sh $(BIN)/python
	$(BIN)/pytest -m cluster tests/cluster $(ARGS)

format: $(READY) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY) ## ruff
	$(BIN)/ruff check .

type: $(READY) ## mypy, strict
	$(BIN)/mypy

check: $(READY) ## all of it: format, lint, types, tests
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory lint type test

docs: $(READY) ## write docs/configuration.md from the schemas and presets
	$(BIN)/python docs/make_configuration.py

constraints: $(READY) ## write the versions of .venv into constraints.txt
	@head=$$(grep '^#' constraints.txt); \
	versions=$$($(BIN)/python -m pip freeze --all --exclude-editable --exclude pip); \
	printf '%s\n' "$$head" "$$versions" > constraints.txt

image: ## build the container image (VARIANT=cpu|cuda, TORCH_INDEX=url, EXTRAS="image ray", ENGINE, IMAGE, BASE, ARGS)
	$(ENGINE) build --build-arg BASE=$(BASE) --build-arg VARIANT=$(VARIANT) \
	  --build-arg TORCH_INDEX=$(TORCH_INDEX) --build-arg EXTRAS="$(EXTRAS)" --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(ARGS) -t $(IMAGE) .

clean: ## remove caches and builds; .venv, runs and mlflow.db stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
