# make run    the built-in example, end to end        make test      lint and the quick tests, in minutes
# make bench  speed and quality, compared with others make test-all  lint and the tests that CI runs
# make fmt    format everything                       make rulegraph redraw the README's picture
# make docs   the configuration's schema and tables   make chaos     the example with 20 of its processes
# make recipe the tables of docs/recipe.md                           killed; the result must be the same to the last bit
# make test-interop  only SAEs to and from other libraries
# make test-conda    only one environment per rule
# make gpu           what a machine with an NVIDIA GPU does, and whether results are the same every time

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
CORES ?= all
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Chapters that the benchmarks read: the shipped ones, or a folder with one folder per subject.
CHAPTERS := sae_core/data/raw_data

.PHONY: setup run chaos test test-all tests tests-all test-interop test-conda bench gpu lint lint-types lint-code fmt docs recipe rulegraph clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
	  'error: Python 3.11 or newer is needed: make PYTHON=python3.11')"
	@echo "Installing the pinned dependencies into $(VENV); this takes a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(PEERS)/.installed: tests/tools/peers-requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

run: setup
	@echo "The workflow of config/demo.yaml: once Snakemake has started, each job prints one line and has a log in results/logs/"
	@python scripts/unlock.py
	snakemake --configfile config/demo.yaml --cores $(CORES)
	@cat results/logs/summarise.log
	@echo "SAEs: results/saes/    evaluations: results/evaluations/    table: results/summary.csv"
	@echo "Open $(CURDIR)/results/report.html, which links to the pages of the SAEs' features"

chaos: setup
	rm -rf build/chaos
	PYTHONPATH=$(CURDIR) python tests/tools/chaos.py build/chaos --config config/demo.yaml --kills 20

lint: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync lint-types lint-code

lint-types:
	mypy

lint-code:
	ruff check .
	ruff format --check .
	snakefmt --check workflow
	snakemake --configfile config/demo.yaml --lint

# Types are checked beside the tests: that takes one core for a minute.
test: setup lint-code
	@$(MAKE) --no-print-directory --jobs=2 lint-types tests

tests:
	python -m pytest -m "not slow" --durations=15

test-all: setup $(PEERS)/.installed lint-code
	@$(MAKE) --no-print-directory --jobs=2 lint-types tests-all

tests-all:
	PEERS=$(CURDIR)/$(PEERS)/bin/python python -m pytest --durations=30 \
	  tests/conda tests/workflow tests/interop tests/unit

test-interop: setup $(PEERS)/.installed
	PEERS=$(CURDIR)/$(PEERS)/bin/python python -m pytest --numprocesses=0 tests/interop

test-conda: setup
	python -m pytest --numprocesses=0 tests/conda

bench: export PYTHONPATH := $(CURDIR)
bench: setup $(PEERS)/.installed
	$(PEERS)/bin/python tests/benchmarks/step.py
	python tests/benchmarks/step_profile.py
	python tests/benchmarks/memory.py
	python tests/benchmarks/harvest.py --chapters $(CHAPTERS)
	python tests/benchmarks/features.py --chapters $(CHAPTERS)
	python tests/benchmarks/pages.py
	python tests/benchmarks/corpus.py
	python tests/benchmarks/path.py --chapters $(CHAPTERS)
	python tests/benchmarks/streams.py --chapters $(CHAPTERS)
	python tests/benchmarks/end_to_end.py --chapters $(CHAPTERS)
	python tests/benchmarks/ground_truth.py
	python tests/benchmarks/shards.py build/bench/shard --chapters $(CHAPTERS)
	python tests/benchmarks/fine_tuning.py build/bench/shard
	$(PEERS)/bin/python tests/benchmarks/quality.py build/bench/shard --hooks blocks.14.hook_resid_post \
	  --features 4608 --topks 32 --tokens-per-step 1024 4096 --rates 3e-3 6e-3 --seeds 0 \
	  --records build/bench/trials.jsonl

# Without the peers, which need the network, their columns are empty.
gpu: export PYTHONPATH := $(CURDIR)
gpu: setup
	-$(MAKE) --no-print-directory $(PEERS)/.installed
	@peers=$(PEERS)/bin/python; test -e $(PEERS)/.installed || peers=python; \
	python tests/benchmarks/gpu.py --peers $$peers

fmt: setup
	ruff check --fix .
	ruff format .
	snakefmt workflow

docs: setup
	python -m sae_core.workflow.config_docs

recipe: setup
	PYTHONPATH=$(CURDIR) python tests/benchmarks/recipe_tables.py

rulegraph: setup
	python tests/tools/rulegraph.py > docs/rulegraph.svg

clean:
	rm -rf results .snakemake build
