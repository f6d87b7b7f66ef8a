# make demo   set up, then stream an answer of the default model
# make test   set up, then run the quick tests, on the GPU too where there is one (test-all adds the slow ones)
# make verify compare the kernels' bits with their references', and compile them for cards that are not there

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Without a GPU one pinned torch is enough and every other package accepts it; with one, the newest that fits.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11,<2.14" || echo "torch==2.13.0")

# Two processes, a file's tests in one of them; not where they would share a GPU's memory. Tests of the server count its
# seconds of CPU, which a busy neighbour lengthens: they run by themselves.
WORKERS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-n 2 --dist loadfile")

.PHONY: demo test test-all verify lint clean

demo: $(VENV)/ready
	$(BIN)/gemcutter generate "A box holds 12 pencils. Mia buys 4 boxes and gives 15 pencils to Tom. How many pencils does she have left?"

test: $(VENV)/ready lint
	$(BIN)/python -m pytest $(WORKERS) --ignore tests/serve
	$(BIN)/python -m pytest tests/serve

test-all: $(VENV)/ready lint
	$(BIN)/python -m pytest $(WORKERS) -m "" --ignore tests/serve
	$(BIN)/python -m pytest -m "" tests/serve

verify: $(VENV)/ready
	$(BIN)/gemcutter verify
	$(BIN)/gemcutter verify --compile

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
