# On a fresh clone with Python 3.11, pip and make: `make demo`, `make test`, and while you work `make fast`.
PYTHON ?= python3.11
VENV ?= .venv
EXTRAS ?= dev
BIN = $(VENV)/bin
CODE = src tests benchmarks docs examples
# Two workers, of one thread each; one takes over what the other would do last.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo quick fast test docs oldest lint style format clean

demo: $(VENV)/ready
	$(BIN)/icr demo

quick: $(VENV)/ready
	$(BIN)/icr demo --quick --out runs/quick

# While you work: style, layers, and the tests on tiny models that start no other process.
fast: style
	$(TESTS) -m "not slow and not processes and not browser and not pinned"

test: lint
	$(TESTS)

# The site, into build/site: strict, its links checked, nothing read from the network.
docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The tests that use transformers, with the oldest release of it that pyproject.toml claims.
oldest:
	PYTHON=$(PYTHON) .ci/oldest

style: $(VENV)/ready
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/codespell
	$(BIN)/lint-imports

lint: style
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/ready
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build runs
