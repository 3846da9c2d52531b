# One word per intention. On a machine with Python, git and make, `make quickstart` and `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup quickstart test check e2e parity flake bench docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -e '.[dev]' -c constraints.txt
	touch $@

quickstart: setup
	$(BIN)/llamero run recipes/quickstart.yaml
	$(BIN)/llamero generate runs/quickstart/release/quickstart "How much is 36 + 1?" --temperature 0

test: setup
	$(BIN)/python -m pytest -q -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

e2e: setup
	$(BIN)/python -m pytest -q tests/e2e -m ''
	$(BIN)/python -m pytest -q -n 2 tests/unit -m 'slow and not gpu'

parity: setup
	$(BIN)/python -m pytest -q tests/parity -m ''

flake: setup
	$(BIN)/python tests/flake.py 50

bench: setup
	$(BIN)/pip install -q -e '.[dev,bench]' -c constraints.txt
	$(BIN)/python benchmarks/train_vs_trl.py
	$(BIN)/python benchmarks/pretokenize.py
	$(BIN)/python benchmarks/packing.py

docs: setup
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
