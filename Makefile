# `make demo` and `make test` set up everything they need in .venv; a plain python3, git and make do.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

# The parity tests compare with torch: they run where torch is importable, or with TORCH=1.
TORCH ?= $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo 1)
COMMA := ,
EXTRAS := test,train,lint$(if $(filter 1,$(TORCH)),$(COMMA)parity)

STAMP := $(VENV)/.installed-$(if $(filter 1,$(TORCH)),parity,plain)

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/kvjax demo --out demo_out

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench:
	$(MAKE) TORCH=1 $(VENV)/.installed-parity
	$(BIN)/python -m benchmarks.decode_cpu

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) demo_out runs dist build
