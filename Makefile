# `make demo` and `make test` set up everything they need in .venv; python3, git and make suffice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export JAX_PLATFORMS ?= cpu

# The parity tests compare with torch: they run where torch is importable, or with TORCH=1.
TORCH ?= $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo 1)
TEST := $(if $(filter 1,$(TORCH)),test-parity,test)

AOT_VENV ?= .venv-aot
AOT_GPU_VENV ?= .venv-aot-gpu

# Most of the suite's time is XLA compiling on one core.
JOBS ?= 2

.PHONY: demo report test test-aot test-aot-gpu lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/kvjax demo --out demo_out

# The embedded model's evaluation: runs in report_runs/, pages and pictures in report/index.html.
report: $(VENV)/.installed
	$(BIN)/python -m eval run eval/configs/embedded.yaml --out report_runs
	$(BIN)/python -m eval report report_runs benchmarks/results/needle_metrics.jsonl --out report

test: $(VENV)/.installed-$(TEST)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# Kernels, the training step and plans through the compiler for TPUs: no TPU, a package of 200 MB.
test-aot: $(AOT_VENV)/.installed
	TPU_SKIP_MDS_QUERY=1 $(AOT_VENV)/bin/python -m pytest tests/kernels/test_tpu_compiler.py \
	  tests/train/test_dry_run_aot.py tests/test_plan_aot.py $(PYTEST_ARGS)

# The same for GPUs, with jax's CUDA plugin; needs Python 3.12: PYTHON=python3.12 make test-aot-gpu.
test-aot-gpu: $(AOT_GPU_VENV)/.installed
	$(AOT_GPU_VENV)/bin/python -m pytest tests/kernels/test_gpu.py tests/kernels/test_lengths.py \
	  tests/kernels/test_gpu_compiler.py tests/test_plan_aot_gpu.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint $(VENV)/.installed-$(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test-parity
	$(BIN)/python -m benchmarks.decode_cpu

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What demo and report need: pictures, and YAML for report.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[eval]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.installed-test-parity: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[test,parity]"
	@touch $@

$(AOT_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]" "jax[tpu]==0.10.2"
	@touch $@

$(AOT_GPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(AOT_GPU_VENV)
	$(AOT_GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]" \
	  "jax>=0.12,<0.13" jax-cuda13-pjrt jax-cuda13-plugin
	@touch $@

$(VENV)/.installed-lint: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[lint]"
	@touch $@

clean:
	rm -rf $(VENV) demo_out report report_runs runs dist build
