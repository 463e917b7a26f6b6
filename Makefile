# make demo and make test set up everything they need from a bare python3 (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.mote-ready

.PHONY: install demo test lint bench golden clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: install
	$(BIN)/mote-cli demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files are divided among two processes: the tests of one file share what they make.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# How far every number is from the authors'; GOLDEN names another folder of such files.
golden: install
	$(BIN)/python benchmarks/golden_table.py $(GOLDEN)

bench: install
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
