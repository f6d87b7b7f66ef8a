# make demo   set up, then stream an answer of the default model
# make test   set up, then run the tests (quick ones; test-all adds the slow ones, test-gpu those for a GPU)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Without a GPU one pinned torch is enough and every other package accepts it; with one, the newest that fits.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11,<2.14" || echo "torch==2.13.0")

.PHONY: demo test test-all test-gpu lint clean

demo: $(VENV)/ready
	$(BIN)/gemcutter generate "Mia has 14 marbles. She buys 3 bags with 6 marbles each. How many marbles does she have now?"

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

test-all: $(VENV)/ready lint
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/ready
	$(BIN)/ruff check .

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gemcutter needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
