# fedtune: `make demo` and `make test` install everything themselves; only Python >= 3.11 is needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.DEFAULT_GOAL := help

.PHONY: help install demo test lint audit chaos fuzz mutants bench clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

install: $(READY) ## create .venv and install fedtune with its development tools

demo: $(READY) ## three hospitals fine-tune a real language model under (epsilon, delta)
	$(BIN)/fedtune demo

test: $(READY) lint ## every check: style, types, import contracts, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(READY) ## style, types and import contracts alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

audit: $(READY) ## attack the guarantee at length: audits of ε, sensitivity, variance
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests --ignore tests/dp/test_ledger_chaos.py --ignore tests/dp/test_ledger.py --ignore tests/fuzz --ignore tests/server/test_model.py --ignore tests/network

chaos: $(READY) ## kill -9, power cuts, lost fsyncs, lost messages: a thousand times
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/dp/test_ledger_chaos.py tests/dp/test_ledger.py tests/server/test_model.py tests/network

fuzz: $(READY) ## a million hostile messages to either side
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/fuzz

mutants: $(READY) ## seed a bug for each way DP breaks silently; the tests must catch every one
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants.run --jobs 2

bench: $(READY) ## time and memory beside plain PEFT, trl and Opacus: an hour (BENCH=--quick: minutes)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks $(BENCH)

clean: ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
