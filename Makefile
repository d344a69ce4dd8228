# The README's commands are `make train` and `make test`. The environment is built once, and again when pyproject.toml
# or the constraints change. Plain pip honours whatever package source this machine's pip is configured with.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# A file runs on one worker, in the order that tests/conftest.py gives to files.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Imports write bytecode, which the installation leaves out.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test tests unit check slow mutations foreign compositions matrix tensor types plans fuzz stops faults docs bench reference clean

train: $(READY)
	$(VENV)/bin/farspan train $(ARGS)

# The checks run beside the tests.
test: $(READY)
	$(MAKE) --no-print-directory --jobs 2 check tests

tests: $(READY)
	$(VENV)/bin/python -m pytest -q $(PARALLEL) -m "not gpu and not slow"

unit: $(READY)
	$(VENV)/bin/python -m pytest -q $(PARALLEL) -m "not composes and not dist and not e2e and not gpu and not slow"

check: $(READY)
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }
	$(VENV)/bin/python -m pytest -q tests/test_rooms.py tests/test_words.py -k "circle or share"

slow: $(READY)
	$(VENV)/bin/python -m pytest -q -m "slow and not gpu"

mutations: $(READY)
	$(VENV)/bin/python -m pytest -q -m "slow or not slow" tests/parallel/test_mutations.py tests/models/test_stream.py
	$(VENV)/bin/python -m pytest -q -m "slow or not slow" -k broken tests/parallel/test_adaptive_parity.py tests/parallel/test_pipeline.py

foreign: $(READY)
	$(VENV)/bin/python -m tests.foreign $(ARGS)

compositions: $(READY)
	$(VENV)/bin/python -m tests.compositions $(ARGS)

matrix: $(READY)
	$(VENV)/bin/python -m pytest -qs tests/parallel/test_matrix.py -m "slow or not slow" $(ARGS)

tensor: $(READY)
	$(VENV)/bin/python -m tests.parallel.test_tensor $(ARGS)

types: $(READY)
	$(VENV)/bin/python -m tests.spmd $(ARGS)

plans: $(READY)
	$(VENV)/bin/python -m tests.parallel.fuzz $(ARGS)

fuzz: $(READY)
	$(VENV)/bin/python -m tests.fuzz $(ARGS)

stops: $(READY)
	$(VENV)/bin/python -m pytest -q tests/launch/test_stop.py -m "slow or not slow"

faults: $(READY)
	$(VENV)/bin/python -m tests.launch.faults

docs: $(READY)
	$(VENV)/bin/python -m pytest -q tests/test_docs.py -m "slow or not slow"

bench: $(READY)
	$(VENV)/bin/python -m tests.benchmarks.peers
	$(VENV)/bin/python -m tests.benchmarks.train_rate
	$(VENV)/bin/python -m tests.benchmarks.tracking
	$(VENV)/bin/python -m tests.benchmarks.mixers

reference: $(READY)
	$(VENV)/bin/python -m launch.config.reference

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --no-compile --constraint .ci/constraints.txt --editable '.[dev]'
	# pip would compile all of torch; what a run imports is a seventh of it.
	$(VENV)/bin/python -c "import launch.cli, train.build, ray.train, wandb"
	touch $(READY)

clean:
	rm -rf $(VENV)
