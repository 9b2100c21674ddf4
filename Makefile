# Two commands on a fresh clone with Python 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
EXTRAS ?= dev
BIN = $(VENV)/bin

.PHONY: demo quick test oldest lint format clean

demo: $(VENV)/ready
	$(BIN)/icr demo

quick: $(VENV)/ready
	$(BIN)/icr demo --quick --out runs/quick

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# The tests that use transformers, with the oldest release of it that pyproject.toml claims.
oldest:
	PYTHON=$(PYTHON) .ci/oldest

lint: $(VENV)/ready
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/ready
	$(BIN)/ruff format src tests benchmarks docs
	$(BIN)/ruff check --fix src tests benchmarks docs

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build runs
