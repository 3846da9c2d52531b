# One word per intention. On a machine with Python, git and make, `make quickstart` and `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Programs that ours are compared with, each in an environment of its own (tests/parity/peers).
PEERS := gptqmodel llmcompressor llamacpp bitsandbytes

.PHONY: setup quickstart test check e2e parity peers flake bench docs clean

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

parity: setup peers
	$(BIN)/pip install -q -e '.[dev,parity]' -c constraints.txt
	$(BIN)/python -m pytest -q tests/parity -m ''

peers: $(PEERS:%=.venv-peers/%/.installed)

# Their own statements contradict each other: exact versions that were seen to work, resolved by nobody.
.venv-peers/%/.installed: tests/parity/peers/%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/pip install -q setuptools $$(grep ^torch== $<)
	CMAKE_BUILD_PARALLEL_LEVEL=2 .venv-peers/$*/bin/pip install -q --no-deps -r $<
	touch $@

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
	rm -rf $(VENV) .venv-peers runs .pytest_cache .ruff_cache
