# fedtune: `make demo` and `make test` install everything themselves; only Python >= 3.11 is needed.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2# processes of `make test`
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
TORCH  := 2.13.0# as in the Dockerfiles; the locks hold everything else, with hashes

.DEFAULT_GOAL := help

.PHONY: help install demo test quick lint docs walk audit chaos fuzz drill flower mutants bench lock dist clean-room sbom vulnerabilities containers release clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml locks/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement locks/dev.txt
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

install: $(READY) ## create .venv and install fedtune with its development tools

demo: $(READY) ## three hospitals fine-tune a real language model under (epsilon, delta)
	$(BIN)/fedtune demo

test: $(READY) lint ## every check: style, types, import contracts, tests
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS)

quick: $(READY) ## the tests that catch half of the seeded bugs, in a minute (tests/quick.txt)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.quick -q -n $(WORKERS)

lint: $(READY) ## style, types and import contracts alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY) ## the documentation site in build/site; asks no other host when it is read
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m tests.docs.site

walk: $(READY) ## follow the pages, examples and notebooks line by line; every page in a browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/docs tests/examples tests/dashboard tests/dossier

audit: $(READY) ## attack the guarantee at length: audits of ε, sensitivity, variance
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests --ignore tests/docs --ignore tests/examples --ignore tests/dashboard --ignore tests/dossier --ignore tests/dp/test_ledger_chaos.py --ignore tests/dp/test_ledger.py --ignore tests/fuzz --ignore tests/server/test_model.py --ignore tests/network --ignore tests/isolation --ignore tests/test_full_disk.py --ignore tests/test_locked_database.py

chaos: $(READY) ## kill -9, power cuts, full disks, locks, lost messages: a thousand times
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/dp/test_ledger_chaos.py tests/dp/test_ledger.py tests/server/test_model.py tests/network tests/isolation tests/test_full_disk.py tests/test_locked_database.py

fuzz: $(READY) ## a million hostile messages to either side, six thousand bad inputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/fuzz

drill: $(READY) ## play docs/incidents.md by its own commands, on files and over loopback
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long or not long" tests/client/test_freeze.py tests/docs/test_incidents.py tests/network/test_incidents.py

flower: $(READY) ## ask every release of Flower since 1.40 for what we need of it (WHOLE=--whole: a consortium with each)
	$(BIN)/python -m tests.flower.releases $(WHOLE)

mutants: $(READY) ## seed a bug for each way DP breaks silently; the tests must catch every one
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants.run --jobs 2

bench: $(READY) ## time and memory beside plain PEFT, trl and Opacus: over an hour (BENCH="--quick": ten minutes; "--resume")
	$(BIN)/python -m benchmarks $(BENCH)

LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-emit-package torch --custom-compile-command 'make lock' $(UPGRADE)

lock: ## renew locks/ after a change of pyproject.toml (UPGRADE=--upgrade: with newer releases)
	$(LOCK) pyproject.toml --extra dev --output-file locks/dev.txt
	$(LOCK) pyproject.toml --extra metrics --constraint locks/dev.txt --output-file locks/run.txt
	echo hatchling | $(LOCK) - --constraint locks/dev.txt --output-file locks/build.txt

dist: $(READY) ## the wheel and the source archive in dist/, the same bytes each time
	rm -f dist/*.whl dist/*.tar.gz
	$(BIN)/python -m hatchling build

clean-room: dist ## install the wheel into an empty environment, and run every command in an empty folder
	$(BIN)/python -m tests.clean_room --wheel dist/*.whl --keep build/clean-room

sbom: clean-room ## dist/fedtune.cdx.json: all that the wheel brings, as CycloneDX, with licences
	$(BIN)/cyclonedx-py environment build/clean-room/bin/python --pyproject pyproject.toml \
		--mc-type library --output-reproducible --output-file dist/fedtune.cdx.json

vulnerabilities: $(READY) ## known vulnerabilities of what locks/ holds, and of torch; asks the package index
	$(BIN)/pip-audit --strict --progress-spinner off --disable-pip --require-hashes \
		--requirement locks/run.txt --requirement locks/dev.txt
	echo torch==$(TORCH) | $(BIN)/pip-audit --strict --progress-spinner off --disable-pip --no-deps \
		--requirement /dev/stdin

containers: $(READY) ## build the images and run docker-compose.yml, with Debian's buildah and podman; as root
	$(BIN)/python -m tests.containers

release: $(READY) ## every file of a release in dist/, from a clean clone, checked (KEY=FILE: signed)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.release $(if $(KEY),--key $(KEY))

clean: ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
